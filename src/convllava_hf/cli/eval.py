"""`convllava eval`: measure a model on benchmarks, compare two runs, write a report."""

import argparse
import sys
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path

from ..errors import ConvLlavaError
from ..options import MOST, ImageOptions, LoadingOptions, add_options, options_from, whole_number
from ..utils.logging_utils import quiet_unless_tty, set_verbosity_error
from .common import MODEL_HELP, add_image_arguments, load_assistant, positive_int


_NEEDED = ("datasets", "rapidfuzz", "scipy")


def register(subparsers) -> None:
    parser = subparsers.add_parser(
        "eval",
        help="measure a model on benchmarks, or compare two runs",
        description="Measure a model on benchmarks. The same command resumes an interrupted run. On several "
        "devices: accelerate launch -m convllava_hf eval ...",
        allow_abbrev=False,
    )
    parser.add_argument("model", metavar="MODEL", nargs="?", help=MODEL_HELP)
    parser.add_argument("--benchmark", metavar="NAME[,NAME]", help="such as textvqa,docvqa,pope,mme,mmbench,refcoco+")
    parser.add_argument(
        "--data",
        action="append",
        default=[],
        metavar="PATH_OR_ID",
        help="the data set: parquet, a folder of it, or an id; once for each benchmark (default: the benchmark's id)",
    )
    parser.add_argument("--limit", type=positive_int, metavar="N", help="ask only the first N samples")
    parser.add_argument(
        "--output", default="evaluation", metavar="DIR", help="folder of the runs (default: %(default)s)"
    )
    parser.add_argument("--overwrite", action="store_true", help="start over if the folder holds a run already")
    parser.add_argument("--report", action="store_true", help="also write DIR/report.html")
    _add_settings(parser.add_argument_group("how it is asked"))
    add_image_arguments(parser)
    parser.add_argument(
        "--compare", nargs=2, metavar=("A", "B"), help="two folders of finished runs, side by side; asks nothing"
    )
    parser.add_argument(
        "--show",
        type=whole_number(0, MOST),
        default=10,
        metavar="N",
        help="with --compare: samples that changed (default: %(default)s)",
    )
    parser.add_argument("--json", action="store_true", help="print JSON in place of a table")
    parser.set_defaults(run=run)


def _add_settings(group) -> None:
    group.add_argument(
        "--choice",
        choices=("letter", "likelihood"),
        default="letter",
        help="multiple choice by the letter answered, or by each option's likelihood (default: %(default)s)",
    )
    group.add_argument(
        "--ocr-tokens", action="store_true", help="TextVQA: name what an OCR system read, as LLaVA does"
    )
    group.add_argument("--split", help="another split than the benchmark's, such as testA")
    group.add_argument("--config", metavar="NAME", help="another configuration of the data set")
    group.add_argument(
        "--batch-size", type=whole_number(1, 65536), default=8, metavar="N", help="(default: %(default)s)"
    )
    add_options(group, LoadingOptions)


def run(args: argparse.Namespace) -> int:
    require_evaluation()
    if args.compare:
        return _compare(args)
    if not args.model or not args.benchmark:
        raise ConvLlavaError(
            "Name a model and benchmarks: convllava eval MODEL --benchmark textvqa,pope; or --compare A B."
        )
    return _evaluate(args)


def require_evaluation() -> None:
    """Refuses to evaluate where what it needs is not installed.

    Raises:
        ConvLlavaError: names what is lacking.
    """
    if lacking := [name for name in _NEEDED if find_spec(name) is None]:
        raise ConvLlavaError(f"Evaluation needs {', '.join(lacking)}: pip install 'convllava-hf[eval]'")


def _evaluate(args: argparse.Namespace) -> int:
    import functools
    import json
    import logging

    import torch

    from ..convert.cache import converted_checkpoint
    from ..evaluation.benchmarks import find_benchmark
    from ..evaluation.run_settings import Model, Settings
    from ..evaluation.runner import evaluate, join_processes
    from ..inference.loading import choose_device, choose_dtype, load_processor
    from ..utils.atomic import check_destination

    names = [name.strip() for name in args.benchmark.split(",")]
    if not all(names):
        raise ConvLlavaError(
            f"--benchmark is {args.benchmark!r}; expected names with commas between them, such as textvqa,pope."
        )
    benchmarks = [find_benchmark(name) for name in names]
    if check_destination(args.output, "--output").is_file():
        raise ConvLlavaError(f"--output is {args.output!r}, which is a file: name a folder.")
    data = _data_of_each(args.data, [benchmark.name for benchmark in benchmarks])
    image_options = options_from(args, ImageOptions)
    settings = Settings(
        args.choice, args.ocr_tokens, args.split, args.config, args.limit, args.batch_size, image_options
    )
    logging.basicConfig(format="%(message)s", level=logging.WARNING)
    quiet_unless_tty(with_datasets=True)
    set_verbosity_error()
    trusted = {"trust_remote_code": args.trust_remote_code}
    checkpoint = converted_checkpoint(args.model, **trusted)
    processor = load_processor(checkpoint, **trusted, image_options=image_options)
    state = join_processes(args.device)
    if args.device is None and state.num_processes > 1:
        args.device = str(state.device)
    device = choose_device(args.device)
    dtype = choose_dtype(device, args.dtype)
    model = Model(
        args.model,
        functools.cache(lambda: load_assistant(args, checkpoint)),
        dtype,
        args.quantization,
        torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
        checkpoint,
    )
    records = []
    for benchmark, path in zip(benchmarks, data, strict=True):
        folder, record, source = evaluate(
            benchmark, model, processor, args.output, path, settings, overwrite=args.overwrite
        )
        if state.is_main_process:
            records.append(record)
            if not args.json:
                print("\n".join(_lines(record, folder)), flush=True)
            if args.report:
                from ..evaluation.gallery import save_gallery

                save_gallery(folder, source)
    if state.is_main_process:
        if args.json:
            print(json.dumps(records, ensure_ascii=False))
        if args.report:
            from ..evaluation.html_report import write_report

            print(f"Report: {write_report(args.output)}", file=sys.stderr)
    return 0


def _data_of_each(data: list[str], names: list[str]) -> Sequence[str | None]:
    """The data set of each benchmark: one for each, or one folder that has a folder for each."""
    if len(data) == len(names):
        return list(data)
    if not data:
        return [None] * len(names)
    folders = [str(Path(data[0]) / name) for name in names]
    if len(data) == 1 and all(map(_is_folder, folders)):
        return folders
    raise ConvLlavaError(
        f"--data is given {len(data)} times for {len(names)} benchmarks: give it once for each, in their order, or "
        f"once with a folder that holds the folders {', '.join(names)}."
    )


def _is_folder(path: str) -> bool:
    return Path(path).is_dir()


def _lines(record: dict, folder: Path) -> list[str]:
    low, high = record["interval"]
    lines = [
        f"{record['benchmark']}: {record['metric']} {record['score']:.2f} ({low:.2f} to {high:.2f}), "
        f"{record['samples']} samples, {record['setting']}"
    ]
    if record["failures"]:
        kinds = ", ".join(f"{count} {kind}" for kind, count in record["counts"]["failures"].items())
        lines.append(f"  {record['failures']} failed and are not in the score: {kinds}")
        lines += [f"    {one['id']}: {one['message']}" for one in record["failed"][:3]]
    if record["counts"]["left_out"]:
        lines.append(f"  {record['counts']['left_out']} more are left out: others of their group failed")
    return [*lines, f"  {folder}"]


def _compare(args: argparse.Namespace) -> int:
    import json

    from ..evaluation.comparison import compare, comparison_lines

    compared = compare(*args.compare)
    if args.json:
        print(json.dumps([one.as_dict() for one in compared], ensure_ascii=False))
    else:
        print("\n".join(comparison_lines(compared, args.show)))
    return 0
