"""Data sets of the Hub's form, in any columns, with the columns that training takes.

Images that a table holds as bytes stay where they are, in files that are mapped into memory: only texts are written
again.
"""

import functools
import inspect
import json
import sys
from collections.abc import Iterator
from typing import Any

import datasets as hf
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from datasets.fingerprint import Hasher

from ..utils import texts
from . import conversations, json_reader, paths
from .bad_samples import BadSamples, with_remedy
from .conversations import OTHER_MEDIA, SampleError, identity_of, images_of, sample_of
from .paths import ImageFolder, located


COLUMNS = ("messages", "images", "sample")
TEXT_COLUMNS = ("messages", "conversations")
IMAGE_COLUMNS = ("images", "image")
IMAGES = hf.List(hf.Image(decode=False))
FEATURES = hf.Features(
    {
        "messages": hf.List(
            {"role": hf.Value("string"), "content": hf.List({"type": hf.Value("string"), "text": hf.Value("string")})}
        ),
        "images": IMAGES,
        "sample": hf.Value("int64"),
    }
)
# Between reading and training, rows have what is wrong with them as well: kind and message in JSON, or nothing. So a
# cached result still tells what is to be left out.
FAULT = {"fault": hf.Value("string")}
# Part of the names of cached results, so that another version of this code does not find them.
CODE = Hasher.hash(
    [inspect.getsource(module) for module in (texts, conversations, paths, json_reader, sys.modules[__name__])]
)


def training_row(record: Any, sample: int, folder: ImageFolder, source: str, policy: str) -> dict[str, Any]:
    """A row of `FEATURES` and `FAULT` from a record of any form.

    Args:
        policy: for a sample that cannot be used: `"error"`, or `"skip"` for a row with a fault.

    Raises:
        SampleError: naming source, sample and id.
    """
    try:
        row = sample_of(record)
        images = [located(image, folder) for image in row["images"]]
    except SampleError as error:
        fault = _fault(error, source, sample, record, policy)
        return {"messages": [], "images": [], "sample": sample, "fault": fault}
    return {"messages": row["messages"], "images": images, "sample": sample, "fault": None}


def _fault(error: SampleError, source: str, sample: int, record: Any, policy: str) -> str:
    named = SampleError(error.kind, texts.storable(f"{source}, {name_of(sample, record)}: {error}"))
    if policy == "error":
        raise with_remedy(named) from None
    return json.dumps([named.kind, str(named)])


def name_of(sample: int, record: Any) -> str:
    """How messages name a sample: its index, and its id where it has one."""
    identity = identity_of(record)
    return f"sample {sample}" if identity is None else f"sample {sample} ({identity})"


def without_faults(dataset: hf.Dataset, bad: BadSamples) -> hf.Dataset:
    """The rows that can be used, with the columns of training; the others go to `bad`."""
    if "fault" in dataset.column_names:
        is_good = pc.is_null(dataset.data.column("fault"))
        if len(good := pc.indices_nonzero(is_good)) < len(dataset):
            for index in pc.indices_nonzero(pc.invert(is_good)).to_pylist():
                bad.note(*json.loads(dataset.data.column("fault")[index].as_py()))
            dataset = dataset.select(good.to_pylist())
    return dataset.select_columns(list(COLUMNS))


def streamed_without_faults(dataset: hf.IterableDataset, bad: BadSamples) -> hf.IterableDataset:
    """The same of rows that come while training."""
    return dataset.filter(_can_be_used, fn_kwargs={"bad": bad}).select_columns(list(COLUMNS))


def _can_be_used(row: dict, bad: BadSamples) -> bool:
    if row["fault"] is None:
        return True
    bad.note_streamed(*json.loads(row["fault"]))
    return False


def check_columns(columns: list[str] | None, source: str) -> None:
    """Refuses a data set without conversations.

    Raises:
        SampleError: naming the columns that there are.
    """
    if columns is not None and not set(columns) & set(TEXT_COLUMNS):
        raise SampleError(
            "malformed",
            f"{source} has the columns {', '.join(columns)}; expected `messages` and `images`, or `conversations` and "
            "`image`.",
        )


def streamed_columns(dataset: hf.IterableDataset, folder: ImageFolder, source: str, policy: str) -> hf.IterableDataset:
    """The columns of training and their faults, made as rows come."""
    if dataset.features is not None:
        dataset = dataset.decode(False)
    return dataset.map(
        _streamed_row,
        with_indices=True,
        remove_columns=dataset.column_names,
        features=hf.Features({**FEATURES, **FAULT}),
        fn_kwargs={"folder": folder, "source": source, "policy": policy},
    )


def mapped_columns(dataset: hf.Dataset, folder: ImageFolder, source: str, policy: str) -> hf.Dataset:
    """The columns of training, and their faults where they have some, of a data set in files that are mapped into
    memory."""
    texts = dataset.select_columns([name for name in dataset.column_names if name in (*TEXT_COLUMNS, "id")])
    images, counts = _images(dataset, folder, source, policy)
    texts = texts.map(
        _row_of_texts,
        with_indices=True,
        remove_columns=texts.column_names,
        features=hf.Features({**{name: FEATURES[name] for name in ("messages", "sample")}, **FAULT}),
        fn_kwargs={
            "counts": np.asarray(counts),
            "media": _other_media(dataset),
            "source": source,
            "policy": policy,
            "code": CODE,
        },
        desc=f"Reading {source}",
    )
    if "fault" in images.column_names:
        faults = pc.coalesce(images.data.column("fault"), texts.data.column("fault"))
        table = hf.table.InMemoryTable(pa.table({"fault": faults}))
        merged = _as_dataset(table, hf.Features(FAULT), texts, "faults")
        parts = [texts.remove_columns("fault"), images.remove_columns("fault"), merged]
    else:
        parts = [texts, images]
    return hf.concatenate_datasets(parts, axis=1)


def with_constant(dataset: hf.Dataset | hf.IterableDataset, name: str, value: str) -> hf.Dataset | hf.IterableDataset:
    """The same rows with a column of one text."""
    if isinstance(dataset, hf.IterableDataset):
        features = None if dataset.features is None else hf.Features({**dataset.features, name: hf.Value("string")})
        return dataset.map(_with_value, features=features, fn_kwargs={"name": name, "value": value})
    table = hf.table.InMemoryTable(pa.table({name: pa.repeat(value, len(dataset))}))
    column = _as_dataset(table, hf.Features({name: hf.Value("string")}), dataset, f"{name}: {value}")
    return hf.concatenate_datasets([dataset, column], axis=1)


def undecoded(dataset: hf.Dataset) -> hf.Dataset:
    """The same data set, giving images as `bytes` and `path`."""
    features = hf.Features({name: _without_decoding(feature) for name, feature in dataset.features.items()})
    return _same_table(dataset, features) if features != dataset.features else dataset


def _with_value(row: dict, name: str, value: str) -> dict:
    return {**row, name: value}


def _streamed_row(record: dict, index: int, folder: ImageFolder, source: str, policy: str) -> dict:
    check_columns(list(record), source)
    return training_row(record, index, folder, source, policy)


def _row_of_texts(
    record: dict, index: int, counts: np.ndarray, media: dict[str, np.ndarray], source: str, policy: str, code: str
) -> dict:
    placeholder = {"bytes": b"", "path": None}
    if counts[index] < 0:  # of images with a fault, which is known already
        return {"messages": [], "sample": index, "fault": None}
    there = {name: "a file" for name, is_there in media.items() if is_there[index]}
    record = {**record, **there, "images": [placeholder] * int(counts[index])}
    row = training_row(record, index, ImageFolder(None), source, policy)
    return {"messages": row["messages"], "sample": row["sample"], "fault": row["fault"]}


def _other_media(dataset: hf.Dataset) -> dict[str, np.ndarray]:
    """For each column of video or audio, whether each row has some."""
    found = {}
    for name in OTHER_MEDIA:
        if name in dataset.column_names:
            column = dataset.data.column(name)
            is_there = pc.is_valid(column)
            if pa.types.is_string(column.type) or pa.types.is_large_string(column.type):
                is_there = pc.and_kleene(is_there, pc.not_equal(column, ""))
            elif pa.types.is_list(column.type) or pa.types.is_large_list(column.type):
                is_there = pc.and_kleene(is_there, pc.greater(pc.list_value_length(column), 0))
            elif pa.types.is_struct(column.type):
                fields = [pc.is_valid(pc.struct_field(column, number)) for number in range(column.type.num_fields)]
                is_there = functools.reduce(pc.or_, fields)
            found[name] = np.asarray(is_there.fill_null(False).combine_chunks())
    return found


def _images(dataset: hf.Dataset, folder: ImageFolder, source: str, policy: str) -> tuple[hf.Dataset, Any]:
    """The column `images`, and how many images each row has (an array), -1 where those have a fault, which is then
    in a column of its own."""
    column = next((name for name in IMAGE_COLUMNS if name in dataset.column_names), None)
    if column is None:
        none = pa.array([[]] * len(dataset), IMAGES_TYPE)
        return _in_memory(dataset, none), [0] * len(dataset)
    dataset = undecoded(dataset.select_columns([column]))
    arrays = list(_lists_of_images(dataset.data.column(column)))
    if not all(map(_has_bytes, arrays)):
        dataset = dataset.map(
            _row_of_images,
            with_indices=True,
            remove_columns=[column],
            features=hf.Features({"images": IMAGES, **FAULT}),
            fn_kwargs={"column": column, "folder": folder, "source": source, "policy": policy, "code": CODE},
            desc=f"Locating the images of {source}",
        )
        counts = np.asarray(_lengths(list(dataset.data.column("images").chunks)))
        is_good = np.asarray(pc.is_null(dataset.data.column("fault")).combine_chunks())
        return dataset, np.where(is_good, counts, -1)
    counts = _lengths(arrays)
    if column == "images" and not any(array.null_count for array in arrays):
        return _same_table(dataset, hf.Features({"images": IMAGES})), counts
    return _with_empty_lists(dataset, arrays, counts), counts


def _row_of_images(
    record: dict, index: int, column: str, folder: ImageFolder, source: str, policy: str, code: str
) -> dict:
    try:
        images = [located(image, folder) for image in images_of({column: record[column]})]
    except SampleError as error:
        return {"images": [], "fault": _fault(error, source, index, record, policy)}
    return {"images": images, "fault": None}


IMAGE_TYPE = pa.struct({"bytes": pa.binary(), "path": pa.string()})
IMAGES_TYPE = pa.list_(IMAGE_TYPE)


def _lists_of_images(column: pa.ChunkedArray) -> Iterator[pa.Array]:
    """Chunks of lists of images without copying them; a missing image is a missing list."""
    for chunk in column.chunks:
        if chunk.type == IMAGE_TYPE:
            offsets = pa.array(range(len(chunk) + 1), pa.int32())
            yield pa.ListArray.from_arrays(offsets, chunk, mask=pc.is_null(chunk))
        else:
            yield chunk


def _has_bytes(array: pa.Array) -> bool:
    """Whether every image of a chunk is there as bytes."""
    if array.type != IMAGES_TYPE:
        return False
    images = array.flatten()
    return images.null_count == 0 and images.field("bytes").null_count == 0


def _lengths(arrays: list[pa.Array]) -> list[int]:
    return [length or 0 for array in arrays for length in pc.list_value_length(array).to_pylist()]


def _with_empty_lists(dataset: hf.Dataset, arrays: list[pa.Array], counts: list[int]) -> hf.Dataset:
    """Lists of images as a data set, with empty ones in place of missing ones.

    The empty ones are rows behind the others, brought to their places by an index: the images are not copied.
    """
    empty = [index for index, count in enumerate(counts) if count == 0]
    table = pa.chunked_array([*arrays, pa.array([[]] * len(empty), IMAGES_TYPE)], IMAGES_TYPE)
    lists = _in_memory(dataset, table)
    order = list(range(len(counts)))
    for behind, index in enumerate(empty, start=len(counts)):
        order[index] = behind
    return lists.select(order) if empty else lists


def _in_memory(dataset: hf.Dataset, images: pa.Array | pa.ChunkedArray) -> hf.Dataset:
    """The images of a data set as a separate data set."""
    table = hf.table.InMemoryTable(pa.table({"images": images}))
    return _as_dataset(table, hf.Features({"images": IMAGES}), dataset, "images")


def _same_table(dataset: hf.Dataset, features: hf.Features) -> hf.Dataset:
    return _as_dataset(dataset.data, features, dataset, "same table")


def _as_dataset(table: hf.table.Table, features: hf.Features, origin: hf.Dataset, what: str) -> hf.Dataset:
    # Without a fingerprint that is given, all images would be read to compute one.
    fingerprint = Hasher.hash([origin._fingerprint, what])
    return hf.Dataset(table, info=hf.DatasetInfo(features=features), fingerprint=fingerprint)


def _without_decoding(feature: Any) -> Any:
    if isinstance(feature, (hf.Image, hf.Audio, hf.Video)):
        return type(feature)(decode=False)
    if isinstance(feature, hf.List):
        return hf.List(_without_decoding(feature.feature))
    return feature
