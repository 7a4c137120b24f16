"""Numbers of the last steps that are still on a device: the host reads them some steps late."""

from collections import deque
from collections.abc import Callable, Sequence
from threading import RLock
from typing import Any, Generic, NamedTuple, Protocol, TypeVar

LAG = 4
"""Steps after which numbers are read where reading at once would make the host wait."""
FIRST = 20
"""Steps whose numbers are read together at first: mistakes show in the first steps of a loop."""
BATCH = 64
"""Steps whose numbers are read together from then on."""
_MOST_HELD = 2**17
"""Numbers that may wait on a device; a policy with a norm for each row has many at one step."""

READING = RLock()
"""One for all: another thread may ask for numbers while a step adds its own."""

_Note = TypeVar("_Note")
_Row = TypeVar("_Row")
_Told = TypeVar("_Told")
_Taken_contra = TypeVar("_Taken_contra", contravariant=True)


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


class StepNumbers(NamedTuple):
    """What one step came to, on the host.

    Attributes:
        step: Which call it was, from 0.
        norm: The norm of all gradients before clipping.
        threshold: The norm above which they are clipped; NaN where there is not one for all.
        clipped: Whether any gradient was made smaller.
        skipped: Whether the step was not to be made.
        expected: A loss scaler answers for the skip.
    """

    step: int
    norm: float
    threshold: float
    clipped: bool
    skipped: bool
    expected: bool


class Reader(Protocol[_Taken_contra]):
    """What is told of every step, once its numbers are on the host."""

    def add(self, numbers: _Taken_contra, /) -> None:
        """Take the numbers of the next step."""
        ...


class Copied(Protocol[_Told]):
    """The numbers of several steps, on their way to the host."""

    @property
    def waits(self) -> bool:
        """Whether to read them now would make the host wait."""
        ...

    def read(self) -> list[_Told]:
        """Return the numbers; waits until they are there."""
        ...


class StepRing(Generic[_Row, _Told]):
    """Keeps a row for each step where it is, and brings many rows to the host together.

    A row is what a step left behind anyway: nothing is computed at the step itself. On an
    accelerator the numbers of rows are copied while the device goes on, and read ``LAG`` steps
    later. Every reader is told of every step, in order.

    Args:
        copy: Begins to copy rows to the host, where the host waits for them or not.
        readers: What is told.
    """

    def __init__(
        self,
        copy: Callable[[Sequence[_Row], bool], Sequence[Copied[_Told]]],
        *readers: Reader[_Told],
    ) -> None:
        self._copy = copy
        self.readers: list[Reader[_Told]] = list(readers)
        self._rows: list[_Row] = []
        self._held = 0
        self._size = FIRST
        self._pushed = 0
        self._copied: deque[tuple[int, Copied[_Told]]] = deque()

    def __getstate__(self) -> dict[str, Any]:
        """Copy and pickle without what is on its way: it is read before."""
        self.flush()
        return self.__dict__

    @property
    def waiting(self) -> int:
        """How many rows the readers were not told of, as far as they are not on their way."""
        return len(self._rows)

    def push(self, row: _Row, numbers: int, *, asked: bool = False) -> None:
        """Keep the row of a step.

        Args:
            row: What the step left behind.
            numbers: How many numbers it keeps on the device.
            asked: Whether to begin to bring what there is to the host now.
        """
        with READING:
            self._rows.append(row)
            self._pushed += 1
            self._held += numbers
            if asked or len(self._rows) >= self._size or self._held >= _MOST_HELD:
                self._begin(waiting=False)
            while self._copied:
                since, copied = self._copied[0]
                if copied.waits and self._pushed - since < LAG:
                    break
                self._hand_out()

    def flush(self) -> None:
        """Tell the readers of all steps there were; waits for the device."""
        with READING:
            if self._rows:
                self._begin(waiting=True)
            while self._copied:
                self._hand_out()

    def _begin(self, *, waiting: bool) -> None:
        rows, self._rows, self._held, self._size = self._rows, [], 0, BATCH
        self._copied.extend((self._pushed, copied) for copied in self._copy(rows, waiting))

    def _hand_out(self) -> None:
        _, copied = self._copied.popleft()
        for numbers in copied.read():
            for reader in self.readers:
                reader.add(numbers)
