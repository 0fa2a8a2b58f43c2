"""One data set under any name: JSON and parquet files, folders, ids on the Hub, and the folder of its images."""

import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import ConvLlavaError, first_line
from ..utils.repo_ids import is_repo_id
from .conversations import UnreadableRecord
from .json_reader import SampleFile
from .paths import ImageFolder


if TYPE_CHECKING:
    from datasets import Dataset, IterableDataset

JSON_SUFFIXES = (".json", ".jsonl")
_NOT_SAMPLES = ("dataset_infos.json",)


def open_records(
    path: str | os.PathLike, *, split: str = "train", name: str | None = None
) -> "tuple[SampleFile | RawRows, str | None]":
    """The records of one data set as they are, unchecked, for looking at them.

    Returns:
        An iterable of records, and the folder that images' paths are relative to unless another is given.
    """
    kind, path = kind_of(os.fspath(path))
    if kind == "json":
        files = json_files(path)
        if len(files) > 1:
            raise ConvLlavaError(f"{path} holds {len(files)} files. Name one of them.")
        return SampleFile(files[0]), os.path.dirname(os.path.abspath(files[0]))
    require_datasets()
    from .columns import undecoded

    return RawRows(undecoded(read_raw(kind, path, split, False, name))), _own_folder(kind, path)


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
    kind, path = ("parquet", os.fspath(path)) if files else kind_of(os.fspath(path))
    if kind == "json":
        raise ConvLlavaError(f"{path!r} is JSON, and parquet files or an id on the Hub are expected.")
    require_datasets()
    from .columns import undecoded

    return undecoded(read_raw(kind, list(files) if files else path, split, False, name))


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
    kind, path = kind_of(os.fspath(path))
    return folder_of(kind, path, image_folder)


def kind_of(path: str) -> tuple[str, str]:
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
        return ("json" if json_files(local) else "folder"), local
    if not is_repo_id(path) or path.endswith((*JSON_SUFFIXES, ".parquet")):
        raise ConvLlavaError(f"There is no data set {path!r}: no such file or folder, and no id on the Hub either.")
    return "hub", path


def json_files(path: str) -> list[str]:
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


def folder_of(kind: str, path: str, image_folder: str | os.PathLike | None) -> ImageFolder:
    caches: tuple[str, ...] = ()
    if kind != "json":
        require_datasets()
        import datasets as hf
        from huggingface_hub.constants import HF_HUB_CACHE

        # `datasets` unpacks images there, and names them by absolute paths.
        own = _own_folder(kind, path)
        caches = (*((own,) if own else ()), str(hf.config.HF_DATASETS_CACHE), HF_HUB_CACHE)
    if image_folder is None:
        image_folder = _own_folder(kind, path)
    return ImageFolder(None if image_folder is None else os.path.expanduser(image_folder), caches)


def read_raw(
    kind: str, path: str | list[str], split: str, streaming: bool, name: str | None
) -> "Dataset | IterableDataset":
    """A data set as `datasets` reads it."""
    require_datasets()
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


def require_datasets() -> None:
    try:
        import datasets  # noqa: F401
    except ImportError as error:
        raise ConvLlavaError("Reading this data set needs `datasets`: pip install 'convllava-hf[train]'") from error
