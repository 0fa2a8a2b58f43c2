"""Whether two towers are the same, tensor by tensor."""

import math
from dataclasses import asdict, dataclass
from typing import Any

import torch

from .checkpoint_files import Weights
from .keys import TOWER, Table, rename_key


@dataclass(frozen=True)
class Comparison:
    """How two towers differ.

    `tensors`: that at least one of them has. `differing`: those of other values or shapes, or that only one has.
    `largest`: the largest difference of two values, in `where`. `rounded_to`: the dtype in which tensors are equal
    that are not so in the other tower's dtype.
    """

    tensors: int
    differing: int
    largest: float = 0.0
    where: str | None = None
    lacking: int = 0
    rounded_to: str | None = None

    @property
    def identical(self) -> bool:
        return self.differing == 0

    def __str__(self) -> str:
        rounded = f" after rounding to {self.rounded_to}" if self.rounded_to else ""
        if self.identical:
            return f"are identical{rounded}, all {self.tensors} tensors"
        text = f"differ in {self.differing} of {self.tensors} tensors{rounded}"
        if self.where is not None:
            text += f", by {self.largest:.3g} at most (in {self.where})"
        return text + (f"; {self.lacking} are in one of them only or of another shape" if self.lacking else "")

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


def compare_weights(one: Weights, one_table: Table, other: Weights, other_table: Table) -> Comparison:
    """Compares two towers in float32, with one tensor of each in memory at a time where the files can be mapped.

    Weights that ConvLLaVA does not use, such as the pooling norm, are left out.

    Args:
        one, one_table: weights and the table that gives their names here; names that it does not know are left out.
        other, other_table: likewise.
    """
    files = _files_by_name(one, one_table), _files_by_name(other, other_table)
    common = [name for name in files[0] if name in files[1]]
    lacking = len(files[0].keys() ^ files[1].keys())
    differing, largest, where, rounded_to = lacking, 0.0, None, None
    pairs = dict.fromkeys((files[0][name][0], files[1][name][0]) for name in common)
    for one_file, other_file in pairs:
        with one.open(one_file) as read_one, other.open(other_file) as read_other:
            for name in common:
                if (files[0][name][0], files[1][name][0]) != (one_file, other_file):
                    continue
                first, second = read_one(files[0][name][1]), read_other(files[1][name][1])
                if first.numel() != second.numel() or first.squeeze().shape != second.squeeze().shape:
                    lacking, differing = lacking + 1, differing + 1
                    continue
                rounded, difference = _difference(first.reshape(second.shape), second)
                rounded_to = rounded_to or rounded
                if difference:
                    differing += 1
                    if where is None or difference > largest or math.isnan(difference):
                        largest, where = difference, name.removeprefix(TOWER)
    return Comparison(len(files[0].keys() | files[1].keys()), differing, largest, where, lacking, rounded_to)


def _difference(one: torch.Tensor, other: torch.Tensor) -> tuple[str | None, float]:
    """The dtype in which two tensors of one shape agree, if their own dtypes differ, and their largest difference."""
    difference = (one.float() - other.float()).abs().max().item() if one.numel() else 0.0
    if difference and one.dtype != other.dtype:
        for rounded, exact in ((one, other), (other, one)):
            if torch.equal(exact.to(rounded.dtype), rounded):
                return str(rounded.dtype).removeprefix("torch."), 0.0
    return None, difference


def _files_by_name(weights: Weights, table: Table) -> dict[str, tuple]:
    """`{name here: (file, name there)}` of a tower's weights."""
    found = {}
    for file, names in weights.shapes.items():
        for name in names:
            try:
                ours = rename_key(name, table)
            except KeyError:
                continue
            if ours is not None:
                found[ours] = (file, name)
    return found
