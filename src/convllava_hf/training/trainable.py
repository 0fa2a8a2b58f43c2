"""What trains: from a recipe's patterns to parameters."""

import re
from collections.abc import Iterable
from dataclasses import dataclass
from fnmatch import fnmatchcase

import torch
from torch import nn

from ..errors import ConvLlavaError


# Short names of recipes, and what they are called in the model. Whatever follows a short name stays as it is.
SHORT_NAMES = (
    (r"^projector(?=\.|$)", "model.multi_modal_projector"),
    (r"^vision_tower\.stages(?=\.|$)", "model.vision_tower.encoder.stages"),
    (r"^vision_tower(?=\.|$)", "model.vision_tower"),
    (r"^language_model(?=\.|$)", "model.language_model"),
)


@dataclass
class TrainablePart:
    """One row of the table of what trains: parameters of a part of the model, in numbers of weights."""

    name: str
    trainable: int
    total: int


def full_pattern(pattern: str) -> str:
    """A recipe's pattern with its short name written out: `projector` -> `model.multi_modal_projector`."""
    for short, full in SHORT_NAMES:
        pattern = re.sub(short, full, pattern, count=1)
    return pattern


def resolve_trainable(names: Iterable[str], patterns: Iterable[str]) -> list[str]:
    """The parameters among `names` that train.

    A pattern is a glob (`*`, `?`, `[2-4]`) over the name of a module or of a parameter; a module means everything that
    is in it. Short names: `projector`, `vision_tower`, `vision_tower.stages.N`, `language_model`, `lm_head`.

    Raises:
        ConvLlavaError: a pattern matches nothing, or there are no patterns.
    """
    names, patterns = list(names), list(patterns)
    if not patterns:
        raise ConvLlavaError("`trainable` is empty, so nothing would train. Name modules, such as [projector].")
    matched = {pattern: _matching(names, full_pattern(pattern)) for pattern in patterns}
    if lacking := [pattern for pattern, found in matched.items() if not found]:
        stages = {match[0] for name in names if (match := re.search(r"vision_tower\.encoder\.stages\.\d+", name))}
        raise ConvLlavaError(
            f"`trainable` names {', '.join(map(repr, lacking))}, which matches nothing in this model. It has "
            f"projector, vision_tower with {len(stages)} stages (vision_tower.stages.0 to .{len(stages) - 1}), "
            "language_model and lm_head."
        )
    wanted = set().union(*matched.values())
    return [name for name in names if name in wanted]


def set_trainable(model: nn.Module, patterns: Iterable[str]) -> list[TrainablePart]:
    """Makes exactly the parameters that `patterns` name trainable, and returns a table of them.

    Raises:
        ConvLlavaError: see `resolve_trainable`; or what should train is in float16.
    """
    # A head that is the embedding matrix is one parameter with two names.
    parameters = dict(model.named_parameters(remove_duplicate=False))
    names = resolve_trainable(parameters, patterns)
    if narrow := [name for name in names if parameters[name].dtype == torch.float16]:
        raise ConvLlavaError(
            f"{narrow[0]} is in float16, which is too narrow for full training: set dtype to float32 or bfloat16."
        )
    wanted = {id(parameters[name]) for name in names}
    for parameter in parameters.values():
        parameter.requires_grad_(id(parameter) in wanted)
    return trainable_table(model)


def trainable_table(model: nn.Module) -> list[TrainablePart]:
    """How much of each part of the model trains. Parts without their own weights (a tied head) are left out.

    Raises:
        ConvLlavaError: nothing trains.
    """
    parts: dict[str, TrainablePart] = {}
    for name, parameter in model.named_parameters():
        if ".original_module." in name:  # PEFT keeps it next to the copy that trains
            continue
        part = parts.setdefault(_part_of(name), TrainablePart(_part_of(name), 0, 0))
        part.total += parameter.numel()
        part.trainable += parameter.numel() if parameter.requires_grad else 0
    if not any(part.trainable for part in parts.values()):
        raise ConvLlavaError("Nothing in the model trains. Name modules in `trainable`, or use PEFT.")
    return list(parts.values())


def format_table(parts: list[TrainablePart]) -> str:
    """The table of what trains, as text."""
    total = TrainablePart("all", sum(part.trainable for part in parts), sum(part.total for part in parts))
    width = max(len(part.name) for part in parts)
    lines = [f"{'part':<{width}}  {'trainable':>15}  {'of':>15}"]
    for part in [*parts, total]:
        lines.append(f"{part.name:<{width}}  {part.trainable:>15,}  {part.total:>15,}")
    return "\n".join(lines)


def is_projector(name: str) -> bool:
    return ".multi_modal_projector." in f".{name}"


def is_vision_tower(name: str) -> bool:
    return ".vision_tower." in f".{name}"


def _matching(names: list[str], pattern: str) -> set[str]:
    return {name for name in names if any(fnmatchcase(prefix, pattern) for prefix in _prefixes(name))}


def _prefixes(name: str) -> Iterable[str]:
    """The parameter's own name and those of all modules that it is in."""
    pieces = name.split(".")
    return (".".join(pieces[: end + 1]) for end in range(len(pieces)))


def _part_of(name: str) -> str:
    if is_projector(name):
        return "projector"
    if match := re.search(r"vision_tower\.encoder\.(stages\.\d+)\.", name):
        return f"vision_tower.{match[1]}"
    if is_vision_tower(name):
        return "vision_tower.embeddings"
    part = "lm_head" if re.search(r"(^|\.)lm_head\.", name) else "language_model"
    return f"{part} (adapter)" if ".lora_" in name else part
