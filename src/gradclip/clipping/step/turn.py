"""Whose turn it is: one thread clips while another one assigns a policy, or saves."""

from threading import RLock


class Turn:
    """A lock. A copy, and a pickled one, has a lock of its own.

    Attributes:
        lock: Held by who has the turn.
    """

    def __init__(self) -> None:
        self.lock = RLock()

    def __reduce__(self) -> tuple[type, tuple[()]]:
        """Copy and pickle as one that nobody holds."""
        return Turn, ()
