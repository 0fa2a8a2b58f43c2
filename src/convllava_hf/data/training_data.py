"""From files, folders and Hub ids to one data set with the columns that training takes."""

import logging
import math
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..boxes import DEFAULT_FRAME, check_frame
from ..errors import ConvLlavaError, first_line
from ..utils.repo_ids import is_repo_id
from .bad_samples import BadSamples
from .conversations import UnreadableRecord
from .json_reader import SampleFile
from .paths import ImageFolder


if TYPE_CHECKING:
    from datasets import Dataset, IterableDataset

logger = logging.getLogger(__name__)

JSON_SUFFIXES = (".json", ".jsonl")
ENTRY_KEYS = ("path", "name", "split", "image_folder", "weight", "boxes")
_NOT_SAMPLES = ("dataset_infos.json",)


def load_training_data(
    dataset_name: str | os.PathLike | None = None,
    *,
    split: str = "train",
    image_folder: str | os.PathLike | None = None,
    streaming: bool = False,
    name: str | None = None,
    datasets: Sequence[Mapping[str, Any]] | None = None,
    boxes: str = DEFAULT_FRAME,
    seed: int = 0,
    on_bad_sample: str = "error",
    max_bad_samples: int = 100,
    bad_samples: BadSamples | None = None,
) -> "Dataset | IterableDataset":
    """Conversations with images as one data set.

    Args:
        dataset_name: a JSON or JSONL file or a folder of them, a parquet file or a folder of them, a folder that
            `Dataset.save_to_disk` wrote, or an id on the Hub. Samples are of LLaVA's form (`conversations`, `image`)
            or of the Hub's (`messages`, `images` or `image`).
        split: of data sets that have splits.
        image_folder: what paths of images are relative to, and must stay in; default: the folder of the file.
        streaming: read while training, in the file's order; the result has no length.
        name: configuration of a data set on the Hub.
        datasets: a mixture in place of `dataset_name`, one dict for each data set: `path`, and where they differ from
            the other arguments `name`, `split`, `image_folder` and `boxes`; and `weight`, its share of the mixture.
            Without weights all samples are taken, one data set after the other. With weights, of any sum, data
            sets are drawn from in these proportions until one of them is used up, none of its samples taken twice.
        boxes: what boxes in the texts are fractions or thousandths of: `"square"`, the padded square, as in LLaVA's
            files, or `"image"`. Texts are not changed here; the collator of `convllava_hf.training` rewrites boxes
            where the model sees images in the other frame.
        seed: of the draws; and, unless streaming, of the choice of samples from what is not taken whole.
        on_bad_sample: what is done about a sample that cannot be used, such as one with an empty answer, without an
            image for its `<image>`, or with a video: `"error"`, or `"skip"` to leave it out. Unless streaming, they
            are left out here, and one warning says how many of which kind.
        max_bad_samples: with `"skip"`, how many may be left out of all data sets together.
        bad_samples: in place of the two arguments before, an object that also takes the counts of what is left out.

    Returns:
        A data set with the columns `messages` (`role`, `content` as a list of `type` and `text`), `images` (undecoded:
        `bytes`, or else the absolute `path`; files are not opened yet) and `sample` (the index in its own file). If
        boxes are not in the square throughout, also with the column `boxes`: the frame of the row's boxes.

    Raises:
        ConvLlavaError: there is no such data set, it is broken (with line and column) or without a sample that can be
            used, a sample is not as it should be (with its index and id) or names an image outside the folder, or too
            many are not. When streaming, samples are looked at as they come.
    """
    bad = BadSamples(on_bad_sample, max_bad_samples) if bad_samples is None else bad_samples
    if (dataset_name is None) == (not datasets):
        raise ConvLlavaError("Name one data set or a mixture: set either `dataset_name` or `datasets`.")
    check_frame(boxes)
    if dataset_name is not None:
        loaded = [_load(os.fspath(dataset_name), split, image_folder, streaming, name, bad)]
        return _reported(_with_frames(loaded, [boxes]), bad)[0]
    entries = [_checked(entry) for entry in datasets]
    weights = _weights(entries)
    loaded = [
        _load(
            os.fspath(entry["path"]),
            entry.get("split", split),
            entry.get("image_folder", image_folder),
            streaming,
            entry.get("name", name),
            bad,
        )
        for entry, weight in zip(entries, weights or [1] * len(entries), strict=True)
        if weight
    ]
    frames = [
        entry.get("boxes", boxes)
        for entry, weight in zip(entries, weights or [1] * len(entries), strict=True)
        if weight
    ]
    loaded = _reported(_with_frames(loaded, frames), bad)
    return _mixed(loaded, [weight for weight in weights or () if weight], seed, streaming)


def open_records(
    path: str | os.PathLike, *, split: str = "train", name: str | None = None
) -> "tuple[SampleFile | RawRows, str | None]":
    """The records of one data set as they are, unchecked, for looking at them.

    Returns:
        An iterable of records, and the folder that images' paths are relative to unless another is given.
    """
    kind, path = _kind_of(os.fspath(path))
    if kind == "json":
        files = _json_files(path)
        if len(files) > 1:
            raise ConvLlavaError(f"{path} holds {len(files)} files. Name one of them.")
        return SampleFile(files[0]), os.path.dirname(os.path.abspath(files[0]))
    _require_datasets()
    from .columns import undecoded

    return RawRows(undecoded(_raw(kind, path, split, False, name))), _own_folder(kind, path)


def load_rows(
    path: str | os.PathLike, *, split: str, name: str | None = None, files: Sequence[str] | None = None
) -> "Dataset":
    """The rows of one data set as they are, with images undecoded (`bytes` and `path`).

    Args:
        path: a parquet file, a folder that `Dataset.save_to_disk` wrote, another folder, or an id on the Hub.
        split: of data sets that have splits.
        name: configuration of a data set on the Hub.
        files: read these parquet files of the folder `path`.

    Raises:
        ConvLlavaError: there is no such data set, or it cannot be read.
    """
    kind, path = ("parquet", os.fspath(path)) if files else _kind_of(os.fspath(path))
    if kind == "json":
        raise ConvLlavaError(f"{path!r} is JSON, and parquet files or an id on the Hub are expected.")
    _require_datasets()
    from .columns import undecoded

    return undecoded(_raw(kind, list(files) if files else path, split, False, name))


class RawRows:
    """Rows of a data set with undecoded images, in the shape of `SampleFile`."""

    def __init__(self, dataset: "Dataset"):
        self.dataset = dataset
        self.size = len(dataset)
        self.position = 0

    def __iter__(self) -> Iterator[dict[str, Any]]:
        for index in range(self.size):
            self.position = index + 1
            try:
                record = self.dataset[index]
            except UnicodeDecodeError as error:  # a table holds bytes, even where it says text
                record = UnreadableRecord("broken text", f"It has a text that is not UTF-8: {error.reason}.")
            yield record


def folder_of_images(path: str | os.PathLike, image_folder: str | os.PathLike | None) -> ImageFolder:
    """The folder in which a data set's images must lie."""
    kind, path = _kind_of(os.fspath(path))
    return _folder(kind, path, image_folder)


def _load(
    path: str,
    split: str,
    image_folder: str | os.PathLike | None,
    streaming: bool,
    name: str | None,
    bad: BadSamples,
) -> "Dataset | IterableDataset":
    """One data set without the samples that are to be left out, which go to `bad`; streaming, as they come."""
    kind, path = _kind_of(path)
    folder = _folder(kind, path, image_folder)
    _require_datasets()
    from . import columns

    if kind == "json":
        dataset = _from_json(_json_files(path), folder, streaming, bad.policy)
    else:
        dataset = _raw(kind, path, split, streaming, name)
        columns.check_columns(dataset.column_names, path)
        convert = columns.streamed_columns if streaming else columns.mapped_columns
        try:
            dataset = convert(dataset, folder, path, bad.policy)
        except UnicodeDecodeError as error:
            raise ConvLlavaError(
                f"{path} has a text that is not UTF-8: {error.reason}. `convllava data check` says in which sample."
            ) from error
    if streaming:
        return columns.streamed_without_faults(dataset, bad)
    before = len(dataset)
    dataset = columns.without_faults(dataset, bad)
    if not len(dataset):
        bad.check_bound()
        raise ConvLlavaError(f"{path} has {before} samples, and none that can be used. See `convllava data check`.")
    return dataset


def _with_frames(
    loaded: "list[Dataset] | list[IterableDataset]", frames: Sequence[str]
) -> "list[Dataset] | list[IterableDataset]":
    """The same rows with the frame of their boxes, which stays with them in a mixture."""
    from .columns import with_constant

    if set(frames) == {DEFAULT_FRAME}:
        return loaded  # rows that say nothing have boxes of this frame
    return [with_constant(dataset, "boxes", frame) for dataset, frame in zip(loaded, frames, strict=True)]


def _reported(loaded: "list[Dataset | IterableDataset]", bad: BadSamples) -> "list[Dataset | IterableDataset]":
    """The data sets, once it is said what was left out of them.

    Raises:
        SampleError: that was too much.
    """
    bad.check_bound()
    bad.warn(of=bad.total + sum(len(dataset) for dataset in loaded if hasattr(dataset, "__len__")))
    return loaded


def _from_json(files: list[str], folder: ImageFolder, streaming: bool, policy: str) -> "Dataset | IterableDataset":
    import datasets as hf

    from .columns import CODE, FAULT, FEATURES

    features = hf.Features({**FEATURES, **FAULT})
    kwargs = {"files": files, "folder": folder, "policy": policy}
    if streaming:
        return hf.IterableDataset.from_generator(json_rows, features=features, gen_kwargs=kwargs)
    # What was read is kept in the cache under a name made of these, so that a file that has changed is read again.
    state = tuple((os.stat(file).st_size, os.stat(file).st_mtime_ns) for file in files)
    try:
        return hf.Dataset.from_generator(
            json_rows, features=features, gen_kwargs={**kwargs, "state": state, "code": CODE}
        )
    except hf.exceptions.DatasetGenerationError as error:
        raise (error.__cause__ or error) from None


def json_rows(
    files: list[str], folder: ImageFolder, policy: str, state: tuple = (), code: str = ""
) -> Iterator[dict[str, Any]]:
    """Rows for training from JSON and JSONL files; `sample` counts within each file."""
    from .columns import training_row

    for file in files:
        for sample, record in enumerate(SampleFile(file)):
            yield training_row(record, sample, folder, file, policy)


def _kind_of(path: str) -> tuple[str, str]:
    """What a name refers to: `json`, `parquet`, `saved` (to disk), `folder` or `hub`; and the path."""
    local = os.path.expanduser(path)
    if os.path.isfile(local):
        suffix = Path(local).suffix.lower()
        if suffix not in (*JSON_SUFFIXES, ".parquet"):
            raise ConvLlavaError(f"{path!r} is a {suffix or 'nameless'} file; expected .json, .jsonl or .parquet.")
        return ("parquet" if suffix == ".parquet" else "json"), local
    if os.path.isdir(local):
        names = set(os.listdir(local))
        if names >= {"state.json", "dataset_info.json"} or "dataset_dict.json" in names:
            return "saved", local
        return ("json" if _json_files(local) else "folder"), local
    if not is_repo_id(path) or path.endswith((*JSON_SUFFIXES, ".parquet")):
        raise ConvLlavaError(f"There is no data set {path!r}: no such file or folder, and no id on the Hub either.")
    return "hub", path


def _json_files(path: str) -> list[str]:
    """The files of samples in a folder that holds no other data; or the file itself."""
    if os.path.isfile(path):
        return [path]
    names = sorted(os.listdir(path))
    if any(name.endswith((".parquet", ".arrow", "metadata.jsonl", "metadata.csv")) for name in names):
        return []
    return [os.path.join(path, name) for name in names if name.endswith(JSON_SUFFIXES) and name not in _NOT_SAMPLES]


def _own_folder(kind: str, path: str) -> str | None:
    if kind == "hub":
        return None
    return path if os.path.isdir(path) else os.path.dirname(os.path.abspath(path))


def _folder(kind: str, path: str, image_folder: str | os.PathLike | None) -> ImageFolder:
    caches: tuple[str, ...] = ()
    if kind != "json":
        _require_datasets()
        import datasets as hf
        from huggingface_hub.constants import HF_HUB_CACHE

        # `datasets` unpacks images there, and names them by absolute paths.
        own = _own_folder(kind, path)
        caches = (*((own,) if own else ()), str(hf.config.HF_DATASETS_CACHE), HF_HUB_CACHE)
    if image_folder is None:
        image_folder = _own_folder(kind, path)
    return ImageFolder(None if image_folder is None else os.path.expanduser(image_folder), caches)


def _raw(
    kind: str, path: str | list[str], split: str, streaming: bool, name: str | None
) -> "Dataset | IterableDataset":
    """A data set as `datasets` reads it."""
    _require_datasets()
    import datasets as hf

    try:
        if kind == "saved":
            dataset = hf.load_from_disk(path)
            if isinstance(dataset, hf.DatasetDict):
                if split not in dataset:
                    raise ConvLlavaError(f"{path} has no split {split!r}; it has {', '.join(dataset)}.")
                dataset = dataset[split]
            return dataset.to_iterable_dataset() if streaming else dataset
        if kind == "parquet":
            return hf.load_dataset("parquet", data_files=path, split="train", streaming=streaming)
        return hf.load_dataset(path, name=name, split=split, streaming=streaming)
    except hf.exceptions.DatasetGenerationError as error:
        raise ConvLlavaError(f"Cannot read the data set {path!r}: {first_line(error.__cause__ or error)}") from error
    except (OSError, ValueError, hf.exceptions.DatasetsError) as error:
        if isinstance(error, ConvLlavaError):
            raise
        where = "There is no folder of that name here, and from the Hub: " if kind == "hub" else ""
        raise ConvLlavaError(f"Cannot load the data set {path!r}. {where}{first_line(error)}") from error


def _require_datasets() -> None:
    try:
        import datasets  # noqa: F401
    except ImportError as error:
        raise ConvLlavaError("Reading this data set needs `datasets`: pip install 'convllava-hf[train]'") from error


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


def _mixed(
    loaded: "list[Dataset] | list[IterableDataset]", weights: list[float], seed: int, streaming: bool
) -> "Dataset | IterableDataset":
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
