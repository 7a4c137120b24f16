"""Numbers of the last steps that are still on a device: the host reads them some steps late."""

from collections import deque
from typing import Generic, Protocol, TypeVar

LAG = 4
"""Steps after which numbers are read where reading at once would make the host wait."""

_Note = TypeVar("_Note")


class Pending(Protocol):
    """Numbers on their way to the host."""

    def read(self) -> list[float]:
        """Return the numbers; waits until they are there."""
        ...


class Ring(Generic[_Note]):
    """Keeps the numbers of each step, and hands them out ``LAG`` steps later.

    All ranks get the numbers of a step at the same later step.
    """

    def __init__(self) -> None:
        self._waiting: deque[tuple[Pending, _Note]] = deque()
        self.used = False
        """Whether there were ever numbers to wait for."""

    def __reduce__(self) -> tuple[type, tuple[()]]:
        """Copy and pickle without what is on its way."""
        return Ring, ()

    def push(self, numbers: Pending | None, note: _Note) -> tuple[list[float], _Note] | None:
        """Keep the numbers of this step; return those of ``LAG`` steps ago, if there are any.

        Args:
            numbers: On their way to the host; None keeps nothing.
            note: What the host knows of this step, handed out with them.
        """
        if numbers is None:
            return None
        self.used = True
        self._waiting.append((numbers, note))
        return self.pop() if len(self._waiting) > LAG else None

    def pop(self) -> tuple[list[float], _Note] | None:
        """Return the oldest numbers that wait, waiting for them; None if there are none."""
        if not self._waiting:
            return None
        numbers, note = self._waiting.popleft()
        return numbers.read(), note

    def clear(self) -> None:
        """Forget what waits."""
        self._waiting.clear()
