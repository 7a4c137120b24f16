"""How long a test waits for other processes: longer where the machine is busy."""

import os

LIMIT = 100.0
LONGEST = 5
"""At most so many times as long; ``timeout`` in pyproject.toml is longer than any wait here."""


def seconds(alone: float = LIMIT) -> float:
    """How long to wait for what takes less than ``alone`` seconds on a machine without other work.

    The load average is the number of processes that want a core. Where it is twice the number of
    cores, everything takes twice as long. It lags behind by a minute, so ``LIMIT`` itself is far
    more than any test takes: a limit costs nothing where nothing hangs.
    """
    load = os.getloadavg()[0] / (os.cpu_count() or 1)
    return alone * min(max(load, 1.0), LONGEST)
