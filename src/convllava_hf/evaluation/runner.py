"""Runs a benchmark: asks what was not asked yet, and writes samples and record.

A run's folder holds `run.json` (what decides the answers), `samples.jsonl` (a line a sample) and, once it has come to
its end, `record.json`. Several processes (torchrun, accelerate launch) share the samples among them.
"""

import contextlib
import logging
import os
import sys
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from datetime import timedelta
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from accelerate.utils import parse_flag_from_env
from tqdm import tqdm

from ..errors import ConvLlavaError
from ..modeling.processing_convllava import ConvLlavaProcessor
from ..utils.atomic import check_destination, lock_next_to
from .benchmarks import Benchmark
from .engine import Reply, ask_in_parts
from .evaluation_record import ids_left_out, make_record, write_record
from .prediction_log import SAMPLES_FILE, PredictionLog, merge_shards, read_rows
from .predictor import Batch, Predictor, user_question
from .run_settings import Model, Settings, begin, describe_run
from .samples import LETTERS, Sample
from .sources import Failure, Plan, Source, open_source, plan_samples
from .validating import check_row


logger = logging.getLogger(__name__)

_LOGGED = 5  # failures that are named while a run is on
_PATIENCE = timedelta(hours=12)
_AHEAD = 2  # batches that are made ready while a device other than the CPU is asked another


def join_processes(device: str | None = None) -> PartialState:
    """Joins the processes that a launcher has started; to be called once, before anything is asked.

    Args:
        device: `"cpu"` where no GPU is to be used.

    Raises:
        ConvLlavaError: there are several, and they do not connect: each would ask everything.
    """
    started = int(os.environ.get("WORLD_SIZE", "1"))
    cpu = device == "cpu" or parse_flag_from_env("ACCELERATE_USE_CPU") or not torch.cuda.is_available()
    # The process that is done first waits for the slowest one's last batches.
    state = PartialState(cpu=cpu, **({"timeout": _PATIENCE} if started > 1 else {}))
    if state.num_processes != started:
        raise ConvLlavaError(
            f"{started} processes were started, and {state.num_processes} of them are connected. Start them by "
            "`accelerate launch -m convllava_hf eval` or torchrun; on CPUs with ACCELERATE_USE_CPU=true."
        )
    return state


def evaluate(
    benchmark: Benchmark,
    model: Model,
    processor: ConvLlavaProcessor,
    output: str | os.PathLike,
    data: str | os.PathLike | None = None,
    settings: Settings | None = None,
    *,
    overwrite: bool = False,
    progress: bool = True,
) -> tuple[Path, dict[str, Any], Source]:
    """Runs a benchmark, or resumes a run that was interrupted.

    Args:
        output: folder of runs; this one gets a folder of its own in it.
        data: see `open_source`.
        overwrite: start over where there is a run already.

    Returns:
        The run's folder, its record, and the data that it asked about.

    Raises:
        ConvLlavaError: the data set is not there or lacks columns, the folder holds a run with other settings or is
            being written by another process, or no sample could be scored.
    """
    settings = settings or Settings()
    state = PartialState()
    prompt = benchmark.prompt_with_words if settings.ocr_tokens else benchmark.prompt
    with state.main_process_first():  # which fills the cache of `datasets`
        source = open_source(benchmark, data, split=settings.split, config=settings.config, words=settings.ocr_tokens)
    plan = plan_samples(source, prompt, settings.limit)
    run = describe_run(source, plan, model, processor, prompt, settings)
    folder = check_destination(output, "--output") / settings.folder_name(benchmark)
    with _sole_writer(folder):
        record = _run(source, plan, model, processor, folder, run, settings, overwrite, progress)
    return folder, record, source


@contextlib.contextmanager
def _sole_writer(folder: Path) -> Iterator[None]:
    """Locks the folder against other runs. Of several processes of this run, the main one holds the lock."""
    if not PartialState().is_main_process:
        yield
        return
    folder.parent.mkdir(parents=True, exist_ok=True)
    with lock_next_to(folder):
        yield


def _run(
    source: Source,
    plan: Plan,
    model: Model,
    processor: ConvLlavaProcessor,
    folder: Path,
    run: dict[str, Any],
    settings: Settings,
    overwrite: bool,
    progress: bool,
) -> dict[str, Any]:
    """Asks what was not asked yet, and writes the record; returns it in the main process."""
    state, benchmark = PartialState(), source.benchmark
    if state.is_main_process:
        begin(folder, run, overwrite)
        for row in merge_shards(folder, plan.ids).values():
            check_row(row, folder / SAMPLES_FILE, benchmark)
    state.wait_for_everyone()
    _ask_rest(source, plan, model, folder, settings, progress)
    state.wait_for_everyone()
    record: dict[str, Any] = {}
    if state.is_main_process:
        rows = merge_shards(folder, plan.ids)
        example = _example(processor, plan, settings.choice == "likelihood")
        about = {
            "example_prompt": example,
            "batch_size": settings.batch_size,
            "device": model.device,
            "processes": state.num_processes,
        }
        record = make_record(benchmark, plan, [rows[name] for name in plan.ids], run, about)
        merge_shards(folder, plan.ids, left_out=ids_left_out(benchmark, plan, rows))
        write_record(folder, record)
    state.wait_for_everyone()
    return record


def _ask_rest(source: Source, plan: Plan, model: Model, folder: Path, settings: Settings, progress: bool) -> None:
    """Asks this process's share of what has no row yet."""
    state = PartialState()
    done = read_rows(folder, parts=False)  # all processes must see the same ones, and others write already
    rest = [sample for name, sample in plan.samples.items() if name not in done]
    told = 0
    with PredictionLog(folder, state.process_index) as prediction_log:
        if state.is_main_process:
            lost = {name: failure for name, failure in plan.failures.items() if name not in done}
            prediction_log.append(failure_row(name, failure) for name, failure in lost.items())
            told = _tell(source, lost, told)
        if not rest:
            return
        predictor = Predictor(
            model.load().with_image_options(**settings.image_options),
            source,
            source.benchmark.max_new_tokens,
            settings.choice == "likelihood",
        )
        batches = make_batches(rest, predictor.lengths(rest), settings.batch_size, predictor.likelihood)
        share = batches[state.process_index :: state.num_processes]
        bar = _Bar(source.benchmark.title, [done[name] for name in plan.samples if name in done], share, progress)
        with bar:
            for rows in answered(predictor, share):
                prediction_log.append(rows)
                lost = {row["id"]: Failure(**row["failure"]) for row in rows if "failure" in row}
                told = _tell(source, lost, told)
                bar.update(rows)


def make_batches(samples: Sequence[Sample], lengths: Sequence[int], size: int, apart: bool) -> list[list[Sample]]:
    """Batches of samples of like length, the longest first: what does not fit into memory shows at once.

    Args:
        apart: whether questions with options are in batches of their own.
    """
    order = sorted(range(len(samples)), key=lambda index: -lengths[index])  # stable, so always the same
    kinds = [True, False] if apart else [None]
    batches = []
    for kind in kinds:
        of_kind = [samples[index] for index in order if kind is None or bool(samples[index].choices) == kind]
        batches += [of_kind[start : start + size] for start in range(0, len(of_kind), size)]
    return batches


def answered(predictor: Predictor, batches: Sequence[Sequence[Sample]]) -> Iterator[list[dict[str, Any]]]:
    """The rows of each batch, asked one after the other."""
    before = time.perf_counter()
    for batch in _prepared(predictor, batches):
        replies = predict_in_parts(predictor, batch)
        now = time.perf_counter()
        rows = _rows(predictor, batch, replies)
        for row in rows:
            row["seconds"] = round((now - before) / len(rows), 6)
        before = now
        yield rows


def _prepared(predictor: Predictor, batches: Sequence[Sequence[Sample]]) -> Iterator[Batch]:
    """The batches' inputs; the next ones are made ready while a device is busy with one.

    On a CPU they are made when they are needed: they would slow down the model's own threads, whose every operation
    waits for the slowest, by more than they save.
    """
    if predictor.assistant.device.type == "cpu":
        yield from map(predictor.prepare, batches)
        return
    waiting = iter(batches)
    with ThreadPoolExecutor(max_workers=_AHEAD) as pool:
        ready: list[Future[Batch]] = [pool.submit(predictor.prepare, batch) for batch in islice(waiting, _AHEAD)]
        while ready:
            batch = ready.pop(0).result()
            ready += [pool.submit(predictor.prepare, following) for following in islice(waiting, 1)]
            yield batch


def predict_in_parts(predictor: Predictor, batch: Batch) -> list[Reply]:
    """Asks a batch; in halves where it does not fit.

    Raises:
        ConvLlavaError: the device's memory does not hold a single sample.
    """

    def ask(samples: Sequence[Sample]) -> list[Reply] | None:
        part = batch if samples is batch.samples else predictor.prepare(samples)
        return None if part.inputs is None else predictor.predict(part)

    return ask_in_parts(predictor.assistant, batch.samples, ask)


def failure_row(name: str, failure: Failure) -> dict[str, Any]:
    """The row of a sample that got no answer: it has no score."""
    return {"id": name, "failure": {"kind": failure.kind, "message": failure.message}}


def _rows(predictor: Predictor, batch: Batch, replies: Sequence[Reply]) -> list[dict[str, Any]]:
    rows = [failure_row(name, failure) for name, failure in batch.failures.items()]
    for sample, seen, reply in zip(batch.samples, batch.seen, replies, strict=True):
        try:
            judged = _judged(predictor, sample, seen, reply)
        except ConvLlavaError as error:  # the data set's answers are not what the metric needs
            rows.append(failure_row(sample.id, Failure("answers", str(error))))
            continue
        row = {
            "id": sample.id,
            "row": sample.row,
            "question": sample.stem if reply.likelihoods else sample.prompt,
            "prediction": reply.text,
            **judged,
            "answers": list(sample.answers),
            "choices": list(sample.choices),
            "category": sample.category,
            "group": sample.group,
            "image": [seen.width, seen.height],
            "image_key": sample.image,
            "prompt_tokens": reply.prompt_tokens,
            "visual_tokens": reply.visual_tokens,
            "new_tokens": len(reply.token_ids),
        }
        rows.append({key: value for key, value in row.items() if value not in (None, []) or key == "read"})
    return rows


def _judged(predictor: Predictor, sample: Sample, seen, reply: Reply) -> dict[str, Any]:
    if not reply.likelihoods:
        return predictor.source.benchmark.scorer(sample, reply.text, seen)
    values = [one.log_likelihood for one in reply.likelihoods]
    best = max(range(len(values)), key=values.__getitem__)
    return {
        "prediction": sample.choices[best],
        "score": float(LETTERS[best] in sample.answers),
        "read": LETTERS[best],
        "log_likelihoods": [round(value, 5) for value in values],
    }


def _tell(source: Source, failures: dict[str, Failure], told: int) -> int:
    """Logs failures, the first few of a process, and returns how many were logged."""
    for name, failure in islice(failures.items(), max(0, _LOGGED - told)):
        logger.warning("%s, sample %s failed (%s): %s", source.benchmark.title, name, failure.kind, failure.message)
        told += 1
    return told


def _example(processor: ConvLlavaProcessor, plan: Plan, likelihood: bool) -> str | None:
    """A sample's prompt as the model reads it, with one place for the image."""
    sample = next(iter(plan.samples.values()), None)
    if sample is None:
        return None
    words = sample.stem if likelihood and sample.choices else sample.prompt
    return processor.apply_chat_template([user_question(words, None)], add_generation_prompt=True, tokenize=False)


class _Bar:
    """Progress on a terminal, with the score so far; nothing elsewhere.

    With several processes it is the first one's share.
    """

    def __init__(self, title: str, done: Sequence[dict], share: Sequence[Sequence[Sample]], progress: bool):
        state = PartialState()
        scores = [row["score"] for row in done if "score" in row]
        self.total, self.scored = sum(scores), len(scores)
        self.failures = len(done) - len(scores)
        self.bar = tqdm(
            desc=title,
            initial=len(done),
            total=len(done) + sum(map(len, share)),
            unit="sample",
            dynamic_ncols=True,
            disable=not (progress and state.is_main_process and sys.stderr.isatty()),
        )

    def update(self, rows: Sequence[dict]) -> None:
        scores = [row["score"] for row in rows if "score" in row]
        self.total, self.scored = self.total + sum(scores), self.scored + len(scores)
        self.failures += len(rows) - len(scores)
        shown = f"right {100 * self.total / self.scored:.1f}%" if self.scored else "no score yet"
        self.bar.set_postfix_str(f"{shown}, {self.failures} failed" if self.failures else shown, refresh=False)
        self.bar.update(len(rows))

    def __enter__(self) -> "_Bar":
        return self

    def __exit__(self, *exception) -> None:
        self.bar.close()
