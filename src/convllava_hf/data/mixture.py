"""Mixtures: the entries of `datasets` in a recipe, and one data set of several."""

import logging
import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from ..boxes import DEFAULT_FRAME, check_frame
from ..errors import ConvLlavaError


if TYPE_CHECKING:
    from datasets import Dataset, IterableDataset

logger = logging.getLogger(__name__)

ENTRY_KEYS = ("path", "name", "split", "image_folder", "weight", "boxes")


def entries_to_load(
    entries: Sequence[Mapping[str, Any]], defaults: Mapping[str, Any]
) -> tuple[list[dict[str, Any]], list[float]]:
    """The entries of a mixture with all their values, without those of weight 0; and their weights, if they have some.

    Args:
        entries: of `datasets` in `load_training_data`.
        defaults: the values of keys that an entry does not have.

    Raises:
        ConvLlavaError: an entry has no path, an unknown key, or a weight that cannot be used.
    """
    checked = [{**defaults, **_checked(entry)} for entry in entries]
    weights = _weights(checked)
    if weights is None:
        return checked, []
    return [entry for entry, weight in zip(checked, weights, strict=True) if weight], [one for one in weights if one]


def _checked(entry: Mapping[str, Any]) -> Mapping[str, Any]:
    if not isinstance(entry, Mapping) or not entry.get("path"):
        raise ConvLlavaError(f"An entry of `datasets` is {entry!r}; expected at least a `path`.")
    if unknown := sorted(set(entry) - set(ENTRY_KEYS)):
        raise ConvLlavaError(
            f"The entry {entry['path']!r} of `datasets` has {', '.join(map(repr, unknown))}; known are "
            f"{', '.join(ENTRY_KEYS)}."
        )
    entry = {key: value for key, value in entry.items() if value is not None}
    check_frame(entry.get("boxes", DEFAULT_FRAME))
    return entry


def _weights(entries: list[Mapping[str, Any]]) -> list[float] | None:
    weights = [entry.get("weight") for entry in entries]
    if all(weight is None for weight in weights):
        return None
    for entry, weight in zip(entries, weights, strict=True):
        if weight is None:
            raise ConvLlavaError(
                f"{entry['path']!r} has no `weight`, but others of `datasets` have: give all or none."
            )
        if isinstance(weight, bool) or not isinstance(weight, (int, float)) or not 0 <= weight < math.inf:
            raise ConvLlavaError(f"The `weight` of {entry['path']!r} is {weight!r}; expected a number from 0 up.")
    if not sum(weights):
        raise ConvLlavaError("All weights of `datasets` are 0: no sample would be taken.")
    return weights


def mixed(
    loaded: "list[Dataset] | list[IterableDataset]", weights: list[float], seed: int, streaming: bool
) -> "Dataset | IterableDataset":
    """One data set of several: one after the other, or with weights drawn from in these proportions."""
    import datasets as hf

    if len(loaded) == 1:
        return loaded[0]
    if not weights:
        return hf.concatenate_datasets(loaded)
    if not streaming:
        # Of what is not taken whole, a random part is taken and not the first one.
        loaded = [dataset.shuffle(seed=seed) for dataset in loaded]
    shares = [weight / sum(weights) for weight in weights]
    mixture = hf.interleave_datasets(loaded, probabilities=shares, seed=seed, stopping_strategy="first_exhausted")
    if not streaming:
        logger.info("The mixture has %d of %d samples.", len(mixture), sum(map(len, loaded)))
    return mixture
