"""Which parameters an optimizer steps, by name: groups may have been added while a run went on.

An optimizer's own state knows its parameters by number alone. So a run that unfroze a part of its
model, and is resumed by a script that begins with it frozen, finds the groups again by the names of
their parameters.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from gradclip.errors import CheckpointError

__all__ = ["described_groups", "restore_groups"]


def described_groups(
    optimizer: torch.optim.Optimizer, models: Sequence[nn.Module]
) -> list[dict[str, Any]]:
    """Return of each group the names of its parameters, and which of them need gradients.

    What belongs to none of the models has no name.
    """
    names = {id(parameter): name for name, parameter in _named(models).items()}
    return [
        {
            "names": [names.get(id(parameter)) for parameter in group["params"]],
            "requires_grad": [parameter.requires_grad for parameter in group["params"]],
        }
        for group in optimizer.param_groups
    ]


def restore_groups(
    optimizer: torch.optim.Optimizer,
    models: Sequence[nn.Module],
    described: Sequence[Mapping[str, Any]],
    saved: Mapping[str, Any],
) -> None:
    """Add the groups that an optimizer lacks, and let its parameters need gradients as they did.

    Args:
        optimizer: Made as it was when the run began.
        models: Have its parameters.
        described: What ``described_groups`` returned.
        saved: The optimizer's saved state, which has the options of groups.

    Raises:
        CheckpointError: GC301, a parameter of an added group is not among the models.
    """
    there = _named(models)
    for number in range(len(optimizer.param_groups), len(described)):
        names = described[number]["names"]
        unknown = [name for name in names if name not in there]
        if unknown:
            raise CheckpointError(
                f"parameter group {number} was added to the optimizer while the run went on, and "
                f"its parameters {unknown[:4]} are in none of the models that the accelerator "
                "prepared (None: they were in none then). Make the optimizer with that group "
                "before resuming."
            )
        known = saved["param_groups"][number]
        options = {name: value for name, value in known.items() if name != "params"}
        optimizer.add_param_group({**options, "params": [there[name] for name in names]})
    for group, description in zip(optimizer.param_groups, described, strict=False):
        for parameter, needed in zip(group["params"], description["requires_grad"], strict=False):
            if parameter.is_leaf:
                parameter.requires_grad_(needed)


def _named(models: Sequence[nn.Module]) -> dict[str, Tensor]:
    return {
        f"{number}.{name}": parameter
        for number, model in enumerate(models)
        for name, parameter in model.named_parameters()
    }
