"""From files, folders and Hub ids to one data set with the columns that training takes."""

import os
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from ..boxes import DEFAULT_FRAME, check_frame
from ..errors import ConvLlavaError
from .bad_samples import BadSamples
from .dataset_files import folder_of, json_files, kind_of, read_raw, require_datasets
from .json_reader import SampleFile
from .mixture import entries_to_load, mixed
from .paths import ImageFolder


if TYPE_CHECKING:
    from datasets import Dataset, IterableDataset


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
    values = {"name": name, "split": split, "image_folder": image_folder, "boxes": boxes}
    if datasets:
        entries, weights = entries_to_load(datasets, values)
    else:
        entries, weights = [{"path": dataset_name, **values}], []
    loaded = [_load(entry, streaming, bad) for entry in entries]
    loaded = _reported(_with_frames(loaded, [entry["boxes"] for entry in entries]), bad)
    return mixed(loaded, weights, seed, streaming)


def _load(entry: Mapping[str, Any], streaming: bool, bad: BadSamples) -> "Dataset | IterableDataset":
    """One data set without the samples that are to be left out, which go to `bad`; streaming, as they come."""
    kind, path = kind_of(os.fspath(entry["path"]))
    folder = folder_of(kind, path, entry["image_folder"])
    require_datasets()
    from . import columns

    if kind == "json":
        dataset = _from_json(json_files(path), folder, streaming, bad.policy)
    else:
        dataset = read_raw(kind, path, entry["split"], streaming, entry["name"])
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
