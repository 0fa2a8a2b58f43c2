"""Parameter groups with separate learning rates."""

from collections.abc import Iterable

from torch import nn

from .trainable import is_projector, is_vision_tower


def parameter_groups(
    parameters: Iterable[tuple[str, nn.Parameter]],
    decay: set[str],
    weight_decay: float,
    projector_learning_rate: float | None = None,
    vision_tower_learning_rate: float | None = None,
) -> list[dict]:
    """Groups for an optimizer: what trains, by learning rate and by whether it decays.

    Args:
        parameters: names and parameters; frozen ones are left out, so the optimizer holds no state for them.
        decay: names of those that `weight_decay` applies to.
        weight_decay: for them; the others have none.
        projector_learning_rate, vision_tower_learning_rate: their rates; `None` for the optimizer's.

    Returns:
        `[{"params", "weight_decay"[, "lr"]}]`, without empty groups.
    """
    groups: dict[tuple, dict] = {}
    for name, parameter in parameters:
        if not parameter.requires_grad:
            continue
        rate = None
        if is_projector(name):
            rate = projector_learning_rate
        elif is_vision_tower(name):
            rate = vision_tower_learning_rate
        group = groups.setdefault(
            (rate, name in decay), {"params": [], "weight_decay": weight_decay if name in decay else 0.0}
        )
        if rate is not None:
            group["lr"] = rate
        group["params"].append(parameter)
    return list(groups.values())
