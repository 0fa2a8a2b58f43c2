"""The order of samples: batches of one modality and of similar lengths."""

from collections.abc import Iterator, Sequence

import torch
from torch.utils.data import Sampler


# Batches sorted by length at a time: enough to find similar lengths, few enough to leave the order random. Of a small
# data set a quarter at most, so that an epoch's batches are not those of the epoch before.
_SORTED_TOGETHER = 50
_GROUPS = 4


class ModalityLengthSampler(Sampler[int]):
    """Samples such that a step's batches, over all devices, hold either pictures or none, and similar lengths.

    A text-only batch beside one with pictures leaves a device idle while the other runs its tower; a short sample
    beside a long one is mostly padding. What does not fill a batch of one modality goes into mixed ones.

    The order is a function of the seed and the epoch alone, so a resumed run goes on in the same order.

    Args:
        lengths: of every sample, in tokens or anything proportional to them.
        has_picture: of every sample.
        batch_size: samples of a step over all devices.
        seed: of the order.
    """

    def __init__(self, lengths: Sequence[int], has_picture: Sequence[bool], batch_size: int, seed: int):
        if len(lengths) != len(has_picture):
            raise ValueError(f"There are {len(lengths)} lengths, but {len(has_picture)} samples.")
        self.lengths = lengths
        self.has_picture = has_picture
        self.batch_size = batch_size
        self.seed = seed
        self.epoch = 0

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __len__(self) -> int:
        return len(self.lengths)

    def __iter__(self) -> Iterator[int]:
        generator = torch.Generator().manual_seed(1_000_003 * self.seed + self.epoch)
        full, rest = [], []
        for modality in (True, False):
            indices = [index for index, picture in enumerate(self.has_picture) if bool(picture) is modality]
            batches = self._batches(indices, generator)
            if batches and len(batches[-1]) < self.batch_size:
                rest += batches.pop()
            full += batches
        for position in torch.randperm(len(full), generator=generator).tolist():
            yield from full[position]
        yield from (rest[position] for position in torch.randperm(len(rest), generator=generator).tolist())

    def _batches(self, indices: list[int], generator: torch.Generator) -> list[list[int]]:
        """Batches of similar lengths; the last one may be short."""
        shuffled = [indices[position] for position in torch.randperm(len(indices), generator=generator).tolist()]
        whole = len(shuffled) // self.batch_size * self.batch_size
        size = max(1, min(_SORTED_TOGETHER, whole // self.batch_size // _GROUPS)) * self.batch_size
        ordered = []
        for start in range(0, whole, size):
            group = shuffled[start : min(whole, start + size)]
            ordered += sorted(group, key=lambda index: self.lengths[index], reverse=True)
        ordered += shuffled[whole:]
        return [ordered[start : start + self.batch_size] for start in range(0, len(ordered), self.batch_size)]
