"""The order of samples: batches of one modality, of images of similar shapes, and of similar lengths."""

from collections.abc import Iterator, Sequence

import torch
from torch.utils.data import Sampler


# Batches sorted by length at a time: enough to find similar lengths, few enough to leave the order random. Of a small
# data set a quarter at most, so that an epoch's batches are not those of the epoch before.
_SORTED_TOGETHER = 50
_GROUPS = 4
# Where shapes matter as well, similar samples are rarer, so more are looked at.
_SAMPLES_TOGETHER = 2048
# Samples that are kept together within a step, for any number of devices that it is divided among: the order must
# not depend on it.
_PADDED_TOGETHER = 8


class ModalityLengthSampler(Sampler[int]):
    """Samples such that a step's batches, over all devices, hold either images or none, and similar lengths.

    A text-only batch next to one with images leaves a device idle while the other runs its tower; a short sample
    next to a long one is mostly padding. What does not fill a batch of one modality goes into mixed ones.

    With shapes, samples with images are grouped to need little padding, both around images and after texts: they are
    halved by rows, by columns or by length, whichever leaves least to pad in the halves, and so on.

    The order is a function only of the seed, the epoch and the samples of a step, so a resumed run goes on in the
    same order, and every process has the same.

    Args:
        lengths: of every sample, in tokens or anything proportional to them.
        has_image: of every sample.
        batch_size: samples of a step over all devices.
        seed: of the order.
        shapes: rows and columns of visual tokens that every sample's images need room for, (0, 0) without any.
    """

    def __init__(
        self,
        lengths: Sequence[int],
        has_image: Sequence[bool],
        batch_size: int,
        seed: int,
        shapes: Sequence[tuple[int, int]] | None = None,
    ):
        for name, values in (("lengths", lengths), ("shapes", shapes)):
            if values is not None and len(values) != len(has_image):
                raise ValueError(f"There are {len(values)} {name}, but {len(has_image)} samples.")
        self.lengths = lengths
        self.has_image = has_image
        self.shapes = shapes
        if shapes is not None:
            self._extents = [rows for rows, _ in shapes], [columns for _, columns in shapes], list(lengths)
            self._orders = _orders(self._extents)
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
            indices = [index for index, image in enumerate(self.has_image) if bool(image) is modality]
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
        together = _SORTED_TOGETHER
        if self.shapes is not None:
            together = max(together, _SAMPLES_TOGETHER // self.batch_size)
        size = max(1, min(together, whole // self.batch_size // _GROUPS)) * self.batch_size
        ordered = []
        for start in range(0, whole, size):
            group = shuffled[start : min(whole, start + size)]
            ordered += self._arranged(group)
        ordered += shuffled[whole:]
        return [ordered[start : start + self.batch_size] for start in range(0, len(ordered), self.batch_size)]

    def _arranged(self, group: list[int]) -> list[int]:
        """Whole steps of samples of one modality such that neighbors are alike."""
        if self.shapes is None or not self.has_image[group[0]]:
            return sorted(group, key=self.lengths.__getitem__, reverse=True)
        return self._halved(group, self.batch_size)

    def _halved(self, indices: list[int], unit: int) -> list[int]:
        """Halves and halves of halves, in whole units, of the likes of samples with images."""
        if len(indices) <= unit:
            if unit <= _PADDED_TOGETHER or len(indices) <= _PADDED_TOGETHER:
                return sorted(indices, key=self.lengths.__getitem__, reverse=True)
            unit = _PADDED_TOGETHER
        middle = -(-len(indices) // unit // 2) * unit
        halves = []
        for order in self._orders:
            ordered = sorted(indices, key=order.__getitem__, reverse=True)
            halves.append((ordered[:middle], ordered[middle:]))
        first, second = min(halves, key=lambda pair: sum(map(self._padded, pair)))
        return self._halved(first, unit) + self._halved(second, unit)

    def _padded(self, batch: list[int]) -> int:
        """Tokens that tower and language model would see of a batch; one costs either of them about as much."""
        rows, columns, length = (max(map(values.__getitem__, batch)) for values in self._extents)
        return len(batch) * (rows * columns + length)


def _orders(extents: tuple[list[int], list[int], list[int]]) -> list[list[int]]:
    """Numbers that put samples in order by rows, by columns and by length, whose ties the other two decide."""
    bases = [max(values, default=0) + 1 for values in extents]
    orders = []
    for first, second, third in ((0, 1, 2), (1, 0, 2), (2, 0, 1)):
        columns = zip(extents[first], extents[second], extents[third], strict=True)
        orders.append([(a * bases[second] + b) * bases[third] + c for a, b, c in columns])
    return orders
