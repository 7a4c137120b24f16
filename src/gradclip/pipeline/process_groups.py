"""Process groups in a configuration: by the names of a mesh's dimensions, so that a file can."""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Annotated, Any, TypeAlias

from pydantic import PlainSerializer

from gradclip.errors import ArgumentValueError

if TYPE_CHECKING:
    from accelerate import Accelerator

__all__ = ["GroupsByPattern", "resolve_groups"]


def _written(groups: Mapping[str, Any] | None) -> dict[str, Any] | None:
    if groups is None:
        return None
    for pattern, value in groups.items():
        if value and not _names(value):
            raise ValueError(
                f"the process group for {pattern!r} is an object of this process, and no file can "
                "hold it: give the name of a dimension of the accelerator's mesh"
            )
    return {p: list(each) if isinstance(each, tuple) else each for p, each in groups.items()}


GroupsByPattern: TypeAlias = Annotated[
    dict[str, Any], PlainSerializer(_written, when_used="json", return_type=dict[str, Any])
]
"""Process groups, or names of mesh dimensions, by name pattern."""


def resolve_groups(
    argument: str, groups: Mapping[str, Any] | None, accelerator: "Accelerator | None"
) -> dict[str, Any] | None:
    """Return process groups where a mesh's dimensions were named.

    Args:
        argument: Which argument has them.
        groups: By name pattern: a name, several names, or what ``GradientClipper`` takes.
        accelerator: Has the mesh.

    Raises:
        ArgumentValueError: GC010, a name that is no dimension of the accelerator's mesh.
    """
    if groups is None:
        return None
    mesh: Any = getattr(accelerator, "torch_device_mesh", None)
    resolved = {}
    for pattern, value in groups.items():
        names = _names(value)
        known = getattr(mesh, "mesh_dim_names", None) or ()
        for name in names:
            if name not in known:
                raise ArgumentValueError(
                    f"{argument}[{pattern!r}] names the mesh dimension {name!r}, and the "
                    f"accelerator's mesh has {list(known) or 'none'}. Give "
                    "Accelerator(parallelism_config=...) that makes it, or a process group."
                )
        resolved[pattern] = [mesh.get_group(name) for name in names] if names else value
    return resolved


def _names(value: Any) -> list[str]:
    """Return the names that a value consists of; none for anything else."""
    if isinstance(value, str):
        return [value]
    several = isinstance(value, list | tuple) and all(isinstance(each, str) for each in value)
    return list(value) if several else []
