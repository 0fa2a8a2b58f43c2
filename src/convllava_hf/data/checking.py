"""Checks a data set before a training run fails on it."""

import itertools
import multiprocessing
import os
import time
from collections import deque
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from typing import Any

from tqdm import tqdm

from ..errors import ConvLlavaError, first_line
from ..utils.texts import storable
from .check_report import Problem, Report, Tokens
from .conversations import SampleError, identity_of, images_of, sample_of
from .dataset_files import folder_of_images, open_records
from .image_files import examine
from .json_reader import BrokenFileError, SampleFile
from .paths import ImageFolder, located
from .tokens import TokenCounter, template_fault


CHUNK = 64  # samples that a worker takes at once
ALONE = 10  # seconds; what is done by then does not repay the start of workers, who import torch
MOST_WORKERS = 16  # unless asked for; each takes up to 1 GB


class SampleChecker:
    """Checks samples one by one.

    Args:
        folder: where images must lie.
        processor: with one, tokens are counted as well.
        max_length: tokens a sample may have.
        examples: problems of a kind that are kept; all are counted.
    """

    def __init__(self, folder: ImageFolder, processor: Any = None, max_length: int = 2048, examples: int = 3):
        self.folder = folder
        self.examples = examples
        self.max_length = max_length
        self.count_tokens = None if processor is None else TokenCounter(processor, max_length)

    def __call__(self, samples: Iterable[tuple[int, Any]]) -> Report:
        report = Report(self.examples, tokens=None if self.count_tokens is None else Tokens())
        for index, record in samples:
            problems = list(self._problems(record, report))
            for kind, detail in problems:
                report.add_problem(Problem(kind, storable(detail), index, identity_of(record)))
            report.samples += 1
            if problems:
                report.bad.append(index)
        return report

    def _problems(self, record: Any, report: Report) -> Iterator[tuple[str, str]]:
        """Problems of a sample as kind and detail; what it has is added to the report's counts."""
        messages = None
        try:
            messages = sample_of(record)["messages"]
            report.turns += sum(message["role"] != "system" for message in messages)
        except SampleError as error:
            yield error.kind, str(error)
        try:
            images = images_of(record) if isinstance(record, dict) else []
        except SampleError:
            return  # said already
        report.images += len(images)
        report.text_only += messages is not None and not images
        sizes = []
        for image in images:
            try:
                examined = examine(located(image, self.folder))
            except SampleError as error:
                yield error.kind, str(error)
                continue
            if examined.kind is not None:
                yield examined.kind, examined.detail
            if examined.size is not None:
                sizes.append(examined.size)
        if messages is not None:
            report.boxes.add_sample(messages, sizes if len(sizes) == len(images) else ())
        if self.count_tokens is not None and messages is not None and len(sizes) == len(images):
            found = self._token_problems(messages, sizes, report)
            # Where the chat template marks nothing, no sample is to blame.
            blameless = () if self.count_tokens.template_fault is None else ("no supervised token",)
            yield from (problem for problem in found if problem[0] not in blameless)

    def _token_problems(self, messages: list[dict], sizes: list, report: Report) -> Iterator[tuple[str, str]]:
        try:
            tokens, left = self.count_tokens.count(messages, sizes)
        except Exception as error:  # a chat template can raise any exception
            yield "refused by the template", first_line(error)
            return
        report.tokens.add(tokens)
        counts = f"It has {tokens.total} tokens, {tokens.visual} of them visual; the limit is {self.max_length}"
        if left.visual < tokens.visual:  # training cuts texts, but no image
            yield "too many visual tokens", counts
        elif tokens.total > self.max_length:
            yield "too long", counts
        if not left.supervised:
            within = f" within the first {self.max_length} tokens" if tokens.supervised else ""
            yield "no supervised token", f"There is nothing to learn{within}"


def check_data(
    path: str | os.PathLike,
    image_folder: str | os.PathLike | None = None,
    *,
    model: str | os.PathLike | None = None,
    split: str = "train",
    name: str | None = None,
    max_length: int = 2048,
    workers: int | None = None,
    examples: int = 3,
    image_options: Mapping[str, Any] | None = None,
    progress: bool = False,
    trust_remote_code: bool = False,
) -> Report:
    """Checks every sample and decodes every image of a data set.

    Args:
        path, image_folder, split, name: as in `load_training_data`.
        model: folder or Hub id of a checkpoint; its processor counts tokens.
        max_length: tokens that a sample may have; needs `model`.
        workers: processes to use where there is much to do; default: one for each CPU that this one may use, up to 16.
        examples: problems of a kind that are kept; all are counted.
        image_options: how large the model sees images, where not as `model` says: some of `IMAGE_OPTIONS`;
            needs `model`.
        progress: show a bar on standard error.
        trust_remote_code: whether code that comes with `model` may run, see `trust`.

    Raises:
        ConvLlavaError: there is no such data set, folder or model. What is wrong with the data is in the report.
    """
    records, _ = open_records(path, split=split, name=name)
    checker = (
        folder_of_images(path, image_folder),
        load_data_processor(model, image_options, trust_remote_code),
        max_length,
        examples,
    )
    report = Report(examples, tokens=None if model is None else Tokens())
    broken: list[BrokenFileError] = []
    by_bytes = isinstance(records, SampleFile)
    unit = {"unit": "B", "unit_scale": True, "unit_divisor": 1024} if by_bytes else {"unit": " samples"}
    with tqdm(total=records.size, desc="Checking", disable=not progress, **unit) as bar:
        for part in _reports(_chunks(records, broken), checker, workers or _cpus()):
            report.add(part)
            bar.update(records.position - bar.n)
    if checker[1] is not None and (fault := template_fault(checker[1])) is not None:
        report.add_problem(Problem("chat template", fault))
    for error in broken:
        report.add_problem(Problem("broken file", f"{error} Nothing after this point was read."))
    return report


def _chunks(records: Iterable[Any], broken: list[BrokenFileError]) -> Iterator[list[tuple[int, Any]]]:
    """Samples with their indices; where the file breaks off, the error goes to `broken`."""

    def readable() -> Iterator[Any]:
        try:
            yield from records
        except BrokenFileError as error:
            broken.append(error)

    samples = enumerate(readable())
    while chunk := list(itertools.islice(samples, CHUNK)):
        yield chunk


def _reports(chunks: Iterator[list], checker: tuple, workers: int) -> Iterator[Report]:
    """Reports on the chunks, in their order."""
    check = SampleChecker(*checker)
    start = time.monotonic()
    for chunk in chunks:
        yield check(chunk)
        if workers > 1 and time.monotonic() - start > ALONE:
            break
    else:
        return
    # Not forked: torch and the tokenizer may hold locks in threads of this process.
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(workers, context, initializer=_start_worker, initargs=checker) as pool:
        pending: deque = deque()
        try:
            for chunk in chunks:
                pending.append(pool.submit(_check_chunk, chunk))
                if len(pending) > 4 * workers:
                    yield pending.popleft().result()
            while pending:
                yield pending.popleft().result()
        except BrokenProcessPool as error:
            raise ConvLlavaError("A worker was killed, perhaps because memory ran out. Try --workers 1.") from error
        finally:
            pool.shutdown(wait=False, cancel_futures=True)


_checker: SampleChecker | None = None


def _start_worker(*checker) -> None:
    global _checker
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    _checker = SampleChecker(*checker)


def _check_chunk(samples: list[tuple[int, Any]]) -> Report:
    return _checker(samples)


def _cpus() -> int:
    cpus = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return min(cpus, MOST_WORKERS)


def load_data_processor(
    model: str | os.PathLike | None, image_options: Mapping[str, Any] | None = None, trust_remote_code: bool = False
) -> Any:
    if model is None:
        if image_options:
            raise ConvLlavaError(f"{', '.join(image_options)} set how a model sees images: name a model as well.")
        return None
    from ..inference.loading import load_processor

    return load_processor(model, trust_remote_code=trust_remote_code, image_options=image_options)
