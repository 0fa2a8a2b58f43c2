"""The rows of a benchmark, from the Hub or a local copy, and the samples that they ask."""

import hashlib
import json
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..data.dataset_files import folder_of_images, load_rows
from ..data.paths import ImageFolder, located
from ..errors import ConvLlavaError
from ..training_record import portable_name
from .benchmarks import Benchmark
from .samples import MissingValueError, Sample


if TYPE_CHECKING:
    from datasets import Dataset

_PART = re.compile(r"-\d{5}-of-\d{5}.*")  # as the Hub names the parts of a split


@dataclass(frozen=True)
class Failure:
    """A sample that gets no answer. `kind`: missing value, image, too long or answers; `message`: what is wrong."""

    kind: str
    message: str


@dataclass
class Source:
    """A benchmark's rows. `rows`: without images. `dataset`: as the record names it."""

    benchmark: Benchmark
    dataset: str
    split: str
    config: str | None
    rows: "Dataset"
    images: "Dataset"
    folder: ImageFolder  # where images lie that are files
    image_rows: dict[str, int] | None = None  # of images in a table of their own

    def image_of(self, sample: Sample) -> Any:
        """The sample's image as `bytes` and `path`, or what the data set has in its place; not decoded.

        Raises:
            MissingValueError: there is none.
            SampleError: it is a file outside the data set's folder.
        """
        number = sample.row
        if self.image_rows is not None:
            if sample.image not in self.image_rows:
                raise MissingValueError(f"There is no image {sample.image!r} among those of the data set.")
            number = self.image_rows[sample.image]
        image = self.images[number]["image"]
        if isinstance(image, list):
            if len(image) != 1:
                raise MissingValueError(f"`image` holds {len(image)} images; expected one.")
            image = image[0]
        given = image.get("bytes") or image.get("path") if isinstance(image, Mapping) else image
        if not given:
            raise MissingValueError(f"`image` is {image!r:.80}; expected an image.")
        return located(image, self.folder)


@dataclass(frozen=True)
class Plan:
    """What will be asked: `samples` in the data set's order, and rows that ask nothing for they lack something.

    `checksum`: of all questions and answers; two runs with the same one have asked the same.
    """

    samples: dict[str, Sample]
    failures: dict[str, Failure]
    checksum: str

    @property
    def ids(self) -> list[str]:
        return [*self.samples, *self.failures]


def open_source(
    benchmark: Benchmark,
    data: str | os.PathLike | None = None,
    *,
    split: str | None = None,
    config: str | None = None,
    words: bool = False,
) -> Source:
    """Opens a benchmark's data set.

    Args:
        data: a parquet file, a folder with the files of the data set's repository on the Hub or with its parquet
            files only, or an id on the Hub; default: the benchmark's own id.
        split, config: other ones than the benchmark's.
        words: whether OCR tokens are needed.

    Raises:
        ConvLlavaError: there is no such data set, or it lacks columns.
    """
    path = benchmark.dataset if data is None else os.path.expanduser(os.fspath(data))
    split, config = split or benchmark.split, config or benchmark.config
    rows = _rows(path, split, config)
    images, numbers = rows, None
    columns = list(benchmark.columns)
    if words:
        columns.append(str(benchmark.words_column))
    table = None if "image" in rows.column_names else benchmark.images
    columns.append("image" if table is None else "imageId")
    _check_columns(columns, rows.column_names, f"{benchmark.title}'s data set {path!r}")
    if table is not None:
        images = _rows(path, table.split, table.config)
        _check_columns([table.key, "image"], images.column_names, f"The table of images in {path!r}")
        numbers = {str(key): number for number, key in enumerate(images[table.key])}
    return Source(
        benchmark,
        portable_name(path),
        split,
        config,
        rows.remove_columns([name for name in ("image",) if name in rows.column_names]),
        images.select_columns(["image"]),
        folder_of_images(path, None),
        numbers,
    )


def plan_samples(source: Source, prompt: str, limit: int | None = None) -> Plan:
    """The samples of all rows, or of the first ones.

    Args:
        prompt: see `Benchmark.samples_of`.
        limit: samples at most; questions that count together are all taken or none, so there may be a few more.
    """
    benchmark = source.benchmark
    samples: dict[str, Sample] = {}
    failures: dict[str, Failure] = {}
    row: Any  # `datasets` has types for all formats that rows may be given in
    for number, row in enumerate(source.rows):
        try:
            samples |= {sample.id: sample for sample in benchmark.samples_of(row, number, prompt)}
        except MissingValueError as error:
            failures[str(number)] = Failure("missing value", f"Row {number}: {error}")
    if not samples and not failures:
        raise ConvLlavaError(f"{benchmark.title}'s data set {source.dataset!r} has no samples.")
    if limit is not None:
        samples, failures = _first(samples, failures, limit)
    digest = hashlib.sha256()
    for sample in samples.values():
        digest.update(json.dumps(asdict(sample), sort_keys=True).encode())
    return Plan(samples, failures, digest.hexdigest())


def _first(
    samples: dict[str, Sample], failures: dict[str, Failure], limit: int
) -> tuple[dict[str, Sample], dict[str, Failure]]:
    """The first samples and rows that failed, with the others of their groups."""
    order = sorted([*samples, *failures], key=lambda name: [int(part) for part in name.split(".")])
    chosen = set(order[:limit])
    groups = {samples[name].group for name in chosen if name in samples} - {None}
    return (
        {name: one for name, one in samples.items() if name in chosen or one.group in groups},
        {name: failure for name, failure in failures.items() if name in chosen},
    )


def _rows(path: str, split: str, config: str | None) -> "Dataset":
    files = _parquet_files(path, split, config) if os.path.isdir(path) else None
    return load_rows(path, split=split, name=config, files=files)


def _parquet_files(folder: str, split: str, config: str | None) -> list[str] | None:
    """The parquet files of a split in a local copy; `None` if the folder holds none at all.

    A copy of a repository has them as `CONFIG/SPLIT-00000-of-00001.parquet` or in `data/`. Files that are not named so
    are taken all.

    Raises:
        ConvLlavaError: there are only files of other splits, or files of several configurations.
    """
    files = sorted(path.relative_to(folder) for path in Path(folder).rglob("*.parquet"))
    if not files:
        return None
    files = [path for path in files if config in path.parts[:-1]] or files
    splits = {path: _PART.sub("", path.stem) for path in files}
    named = [path for path in files if splits[path] == split]
    if not named and any(_PART.search(path.stem) for path in files):
        raise ConvLlavaError(
            f"{folder!r} holds no split {split!r}; it has {', '.join(sorted(set(splits.values())))}. Choose one by "
            "--split."
        )
    chosen = named or files
    if len(parents := sorted({str(path.parent) for path in chosen})) > 1:
        raise ConvLlavaError(
            f"{folder!r} holds files in {', '.join(parents)}, and no folder {config!r}: name one of them by --data."
        )
    return [os.path.join(folder, path) for path in chosen]


def _check_columns(needed: Sequence[str], there: Sequence[str], what: str) -> None:
    if missing := [name for name in needed if name not in there]:
        raise ConvLlavaError(
            f"{what} lacks the column{'s' * (len(missing) > 1)} {', '.join(missing)}; it has {', '.join(there)}. Give "
            "the data set as it lies on the Hub, or another --split or --config."
        )
