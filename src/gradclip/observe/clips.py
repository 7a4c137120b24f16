"""What clipped gradients, and which: kept until the optimizers have made their steps with it."""

from collections import deque
from typing import TYPE_CHECKING, Any

from torch import Tensor

if TYPE_CHECKING:
    from collections.abc import Iterable

    from gradclip.clipping.result import ClipResult

__all__ = ["Clip", "Clips"]

_MOST = 32


class Clip:
    """One call of a function that clips.

    Args:
        ids: Of the parameters that have a gradient.
        limit: The norm that they may have; None where elements are clamped, or gradclip tells.
        total: Their norm before, where it is known.
        order: p of it.
        scale: What gradients are still multiplied by.

    Attributes:
        norms_T: Norm of each before, if it was measured.
        left_T: Norm of each afterwards, where it follows from nothing else.
        result: What gradclip did.
        used: The numbers of the optimizers whose steps were made with it.
    """

    def __init__(
        self,
        ids: tuple[int, ...],
        limit: float | Tensor | None = None,
        total: Tensor | float | None = None,
        order: float = 2.0,
        scale: float | Tensor | None = None,
    ) -> None:
        self.ids, self.limit, self.total = ids, limit, total
        self.order, self.scale = order, scale
        self.norms_T: tuple[tuple[int, ...], Tensor] | None = None
        self.left_T: tuple[tuple[int, ...], Tensor] | None = None
        self.result: ClipResult | None = None
        self.used: set[int] = set()
        self._set: frozenset[int] | None = None

    @property
    def tells(self) -> bool:
        """Whether it is known what it did, also where no gradient was measured."""
        return self.limit is not None or self.result is not None

    @property
    def members(self) -> frozenset[int]:
        """The ids, to look some up."""
        if self._set is None:
            self._set = frozenset(self.ids)
        return self._set


class Clips:
    """The last ones, of which each optimizer uses each once."""

    def __init__(self) -> None:
        self._last: deque[Clip] = deque(maxlen=_MOST)

    def __len__(self) -> int:
        return len(self._last)

    def again(self, ids: tuple[int, ...], optimizer: int) -> list[Clip]:
        """Return the newest one, if it is of these and was not used: it saves to look closer."""
        newest = self._last[-1]
        if newest.ids != ids or optimizer in newest.used:
            return []
        newest.used.add(optimizer)
        return [newest]

    def add(self, clip: Clip) -> None:
        """Keep one. It stands for earlier ones of the same parameters."""
        self._last = deque((each for each in self._last if each.ids != clip.ids), _MOST)
        self._last.append(clip)

    def of(self, ids: tuple[int, ...], optimizer: int) -> list[Clip]:
        """Return those that a step is made with: the newest of each parameter."""
        found: list[Clip] = []
        covered: set[int] = set()
        wanted: frozenset[int] | None = None
        for clip in reversed(self._last):
            if optimizer in clip.used:
                continue
            if clip.ids == ids:
                both: Iterable[int] = ids
            else:
                wanted = frozenset(ids) if wanted is None else wanted
                both = clip.members & wanted
            if both and covered.isdisjoint(both):
                covered.update(both)
                clip.used.add(optimizer)
                found.append(clip)
                if clip.ids == ids:
                    break
        return found


class Seen:
    """What a wrapper tells of the call that it is around.

    Attributes:
        total: The norm that the function returned.
        result: What gradclip returned.
    """

    total: Any = None
    result: Any = None
