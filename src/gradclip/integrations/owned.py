"""The clipper of an attachment, a callback or a hook, which owns the optimizer's gradients."""

from typing import Any

from gradclip.clipping import GradientClipper
from gradclip.clipping.measure.group import Group
from gradclip.clipping.policies import any_writes
from gradclip.clipping.ranks.peers import Peers
from gradclip.clipping.step.marks import check_none

__all__ = ["OwnedClipper"]


class OwnedClipper(GradientClipper):
    """A clipper that is called before each step, by what has noted itself as the owner.

    What ``clipping.ownership`` cannot know, a clipper of a module or of a list, is found by what
    it did to the gradients.

    Args:
        owner: What calls it, by name in errors.
        args: Those of ``GradientClipper``.
        options: Likewise.

    Raises:
        DoubleClippingError: GC101, in ``clip``, if another clipper came first.
    """

    def __init__(self, *args: Any, owner: str, **options: Any) -> None:
        self._owner = owner
        super().__init__(*args, **options)

    @property
    def writes(self) -> bool:
        """Whether gradients can change at all: what only measures owns nothing."""
        return any_writes(self._policies)

    def _check_owner(self) -> None:
        """Do nothing: whoever made it is the owner."""

    def _collect(self, peers: Peers) -> list[Group]:
        groups = super()._collect(peers)
        for group in groups:
            if group.policy.writes:
                check_none(self._telling(group), self._owner)
        return groups

    def _leave_traces(self, groups: list[Group]) -> None:
        """Do nothing: nobody else clips before the step."""
