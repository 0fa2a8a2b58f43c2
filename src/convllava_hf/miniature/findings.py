"""`convllava quickstart --findings`: what the paper found about towers and resolutions, tried out in miniature.

For each seed a tower and a language model are trained once, then joined and trained in several arms, as many at the
same time as there are cores. Arms that are compared differ in one thing only; all see the same images in the same
order.
"""

import functools
import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import mean
from typing import Any

from ..utils.environment import cpu_name, versions_of
from ..utils.json_files import write_json_rows
from .language import GENERAL, Mix
from .progress import OnStep, logs_to
from .quickstart import (
    EXTRA_STAGE_DEPTH,
    PACKAGES,
    SIDE,
    Job,
    assemble_model,
    count_tokens,
    draw_data,
    on_one_core,
    run_in_lines,
    stage0_jobs,
    train_by_recipe,
)
from .steps import Run
from .world import World


SEEDS = 3
KINDS = ("reading", *GENERAL)
# Signs so small that twice the resolution decides whether their digits can be read.
WORLD = World(sign_sizes=(3, 5))
# Pixels of what the tower sees in stage 0: from a sign's in an image of 128 pixels to over a thing's in one of 256.
TOWER_SIZES = (19, 102)
# No boxes are asked for: the time goes to the kinds that the findings are about.
MIXES = {"stage1": Mix(captions=1.0), "stage2": Mix(captions=0.1)}


@dataclass(frozen=True)
class Arm:
    """One way to build and train a tower.

    Args:
        side: of the images in pixels.
        stages: of the tower, 4 or 5.
        trained: of the tower in stage 2, as the recipe's `trainable` has it.
    """

    label: str
    side: int
    stages: int
    trained: str


ARMS = {
    "frozen": Arm("pretrained stages frozen", SIDE, 5, "vision_tower.stages.4"),
    "from4": Arm("updated from stage 4", SIDE, 5, "vision_tower.stages.[3-4]"),
    "from3": Arm("five stages, updated from stage 3", SIDE, 5, "vision_tower.stages.[2-4]"),
    "from2": Arm("updated from stage 2", SIDE, 5, "vision_tower.stages.[1-4]"),
    "four": Arm("four stages, updated from stage 3", SIDE // 2, 4, "vision_tower.stages.[2-3]"),
}


@dataclass(frozen=True)
class Claim:
    """That one arm answers questions of a kind better than another, as the paper has it; or hardly better.

    Args:
        at_most: the gain up to which it is hardly better; by default it is better if there is any gain.
    """

    text: str
    kind: str
    worse: str
    better: str
    at_most: float | None = None

    def holds(self, gain: float) -> bool:
        gain = round(gain, 4)  # as accuracies are: 0.92 - 0.91 is a hair more than 0.01
        return gain > 0 if self.at_most is None else gain <= self.at_most


@dataclass(frozen=True)
class Finding:
    """What the paper found, and the arms that try it out.

    Args:
        columns, rows: the paper's figures by arm.
        source: where they stand.
    """

    title: str
    question: str
    arms: tuple[str, ...]
    kinds: tuple[str, ...]
    claims: tuple[Claim, ...]
    columns: tuple[str, ...]
    rows: Mapping[str, tuple[float, ...]]
    source: str


_BENCHMARKS = ("MMBench", "SEED", "TextVQA", "DocVQA")
_KINDS = ("reading", "color", "shape", "count")
FINDINGS = (
    Finding(
        "Updating the tower",
        "Both arms read images of twice the side that the tower was pretrained at. One leaves its pretrained stages "
        "as they are; the other updates them from the third on. The fifth stage is new and trained in both.",
        ("frozen", "from3"),
        _KINDS,
        (
            Claim("updating the tower helps reading", "reading", "frozen", "from3"),
            Claim("updating the tower helps to name shapes", "shape", "frozen", "from3"),
        ),
        _BENCHMARKS,
        {"frozen": (63.2, 65.7, 53.7, 29.8), "from3": (66.5, 68.6, 60.0, 40.2)},
        "tables 2 and 3, ConvNeXt-L of four stages at 768 px, frozen and updated",
    ),
    Finding(
        "Five stages at twice the resolution",
        "Both arms spend 16 visual tokens on an image: four stages on 128 pixels a side, five on 256. The tower was "
        "pretrained on things of both sizes, and the digits on signs are small.",
        ("four", "from3"),
        _KINDS,
        (Claim("for as many tokens, the higher resolution reads better", "reading", "four", "from3"),),
        _BENCHMARKS,
        {"four": (66.5, 68.6, 60.0, 40.2), "from3": (64.3, 69.1, 60.7, 42.5)},
        "table 4, 576 tokens: four stages at 768 px, five stages at 1536 px",
    ),
    Finding(
        "Where to start updating",
        "The tower is updated from its second, third or fourth stage on.",
        ("from2", "from3", "from4"),
        _KINDS,
        (
            Claim("reading gains by starting at stage 3 and not at 4", "reading", "from4", "from3"),
            Claim(
                "starting at stage 2 gains a hundredth more at most (in the paper: a thousandth on TextVQA)",
                "reading",
                "from3",
                "from2",
                at_most=0.01,
            ),
        ),
        _BENCHMARKS,
        {
            "from2": (65.1, 67.7, 54.8, 31.1),
            "from3": (65.3, 67.7, 54.7, 31.1),
            "from4": (66.2, 67.0, 52.2, 28.2),
        },
        "table 9, five stages at 768 px",
    ),
)


@dataclass(frozen=True)
class FindingsPlan:
    """How much of everything, for each seed.

    Args:
        tower_steps, language_steps: of stage 0.
        stage1_scenes, stage2_scenes: training samples, each seen once. There is no stage 3.
        test_scenes: that each arm is asked about.
        seeds: how many.
    """

    tower_steps: int = 2400
    language_steps: int = 700
    stage1_scenes: int = 4000
    stage2_scenes: int = 8000
    test_scenes: int = 400
    seeds: int = SEEDS


def open_findings(folder: str | Path, *, seed: int = 0, plan: FindingsPlan | None = None) -> Run:
    """A folder of findings: a new one, or that of a run which was interrupted.

    Args:
        seed: the first; the others follow it.

    Raises:
        ConvLlavaError: the folder holds something else.
    """
    return Run(Path(folder), {"findings": True, "seed": seed, **asdict(plan or FindingsPlan())})


def run_ablations(run: Run) -> dict[str, Any]:
    """Trains and judges all arms for every seed, as far as the run has not come yet.

    Returns:
        What is in `findings.json`.
    """
    settings = {key: value for key, value in run.record["settings"].items() if key != "findings"}
    first, plan = settings.pop("seed"), FindingsPlan(**settings)
    seeds = range(first, first + plan.seeds)
    with logs_to(run.folder / "findings.log"), run.clock("total"):
        for seed in seeds:
            for make_jobs in (_prepare, _align, _train_arms):
                jobs = make_jobs(run.folder / f"seed{seed}", seed, plan)
                run_in_lines(run, {f"seed {seed}: {name}": job for name, job in jobs.items()})
    findings = {
        "seeds": list(seeds),
        "scenes": plan.test_scenes,
        "seconds": run.record["seconds"]["total"],
        "machine": cpu_name(),
        "versions": versions_of(PACKAGES),
        "settings": run.record["settings"],
        **_collect(run, seeds),
    }
    write_json_rows(run.folder / "findings.json", findings)
    return findings


def _prepare(place: Path, seed: int, plan: FindingsPlan) -> dict[str, Job]:
    """Stage 0 and the images of a seed, which its arms share."""
    jobs = stage0_jobs(place / "stage0", seed, plan.tower_steps, plan.language_steps, WORLD, TOWER_SIZES, boxes=False)
    scenes = {"stage1": plan.stage1_scenes, "stage2": plan.stage2_scenes}
    return {**jobs, "data": functools.partial(draw_data, place / "data", scenes, seed, WORLD, MIXES)}


def _align(place: Path, seed: int, plan: FindingsPlan) -> dict[str, Job]:
    """Stage 1, once for each architecture."""
    shapes = sorted({(arm.side, arm.stages) for arm in ARMS.values()}, reverse=True)
    return {
        f"stage 1, {stages} stages": functools.partial(
            on_one_core, functools.partial(_train_stage1, place, side, stages, seed)
        )
        for side, stages in shapes
    }


def _train_arms(place: Path, seed: int, plan: FindingsPlan) -> dict[str, Job]:
    return {
        name: functools.partial(on_one_core, functools.partial(_train_arm, place, name, seed, plan.test_scenes))
        for name in ARMS
    }


def _train_stage1(place: Path, side: int, stages: int, seed: int, on_step: OnStep) -> None:
    start, output = place / f"assembled{stages}", place / f"stage1-{stages}"
    extra = EXTRA_STAGE_DEPTH if stages == 5 else 0
    assemble_model(start, stage0=place / "stage0", seed=seed, side=side, extra_stage_depth=extra)
    options = ["--trainable", "projector", *(["vision_tower.stages.4"] if stages == 5 else [])]
    with logs_to(place / f"stage1-{stages}.log"):
        train_by_recipe(1, start, output, place / "data" / "stage1", seed, on_step, options)


def _train_arm(place: Path, name: str, seed: int, scenes: int, on_step: OnStep) -> None:
    """Stage 2 of an arm, and its scores, into `NAME.json`."""
    arm, output = ARMS[name], place / name
    options = ["--trainable", "projector", arm.trained, "language_model", "lm_head"]
    resumed, started = output.exists(), time.perf_counter()
    with logs_to(place / f"{name}.log"):
        start, data = place / f"stage1-{arm.stages}", place / "data" / "stage2"
        losses = train_by_recipe(2, start, output, data, seed, on_step, options)
        seconds = None if resumed else round(time.perf_counter() - started, 1)
        result = {"seed": seed, "seconds": seconds, **_judge(output, seed, scenes), "losses": losses}
    write_json_rows(place / f"{name}.json", result)


def _judge(checkpoint: Path, seed: int, scenes: int) -> dict[str, Any]:
    """Scores on unseen scenes, and what an image costs."""
    import torch
    from torch.utils.flop_counter import FlopCounterMode

    from ..inference.loading import load_processor
    from ..modeling.modeling_convllava import ConvLlavaForConditionalGeneration
    from .scoring import ask_about_scenes, score

    processor = load_processor(checkpoint)
    model = ConvLlavaForConditionalGeneration.from_pretrained(checkpoint).eval()
    answered = ask_about_scenes(model, processor, WORLD, scenes=scenes, seed=seed, side=SIDE, kinds=KINDS)
    scores = score(answered)
    side = model.config.vision_config.image_size
    with FlopCounterMode(display=False) as counter, torch.inference_mode():
        model.model.vision_tower(torch.zeros(1, 3, side, side, dtype=model.dtype))
    cost = {"visual_tokens": count_tokens(processor), "operations_per_image": counter.get_total_flops()}
    return {**scores, **cost}


def _collect(run: Run, seeds: Sequence[int]) -> dict[str, Any]:
    """What all arms came to, and what follows for each finding."""
    arms = {}
    for name, arm in ARMS.items():
        files = (run.folder / f"seed{seed}" / f"{name}.json" for seed in seeds)
        runs = [json.loads(file.read_text(encoding="utf-8")) for file in files]
        costs = [{what: run.pop(what) for what in ("visual_tokens", "operations_per_image")} for run in runs]
        arms[name] = {
            "label": arm.label,
            "resolution": arm.side,
            "stages": arm.stages,
            **costs[0],  # the same for every seed
            "runs": runs,
        }
    return {"arms": arms, "findings": [_finding(finding, arms) for finding in FINDINGS]}


def _finding(finding: Finding, arms: Mapping[str, Mapping]) -> dict[str, Any]:
    paper = {"columns": finding.columns, "rows": finding.rows, "source": finding.source}
    about = {what: getattr(finding, what) for what in ("title", "question", "arms", "kinds")}
    return {**about, "paper": paper, "conclusion": " ".join(conclude(claim, arms) for claim in finding.claims)}


def conclude(claim: Claim, arms: Mapping[str, Mapping]) -> str:
    """A sentence that says whether a claim holds: in every seed, in none, or in some."""
    gains = [
        better["accuracy"][claim.kind] - worse["accuracy"][claim.kind]
        for worse, better in zip(arms[claim.worse]["runs"], arms[claim.better]["runs"], strict=True)
    ]
    held = sum(map(claim.holds, gains))
    verdict = "reproduced" if held == len(gains) else "not reproduced" if held == 0 else "not decided"
    spread = f"{mean(gains):+.2f} in the mean, {min(gains):+.2f} to {max(gains):+.2f}"
    text = claim.text[0].upper() + claim.text[1:]
    return f"{text}: {verdict}, {held} of {len(gains)} seeds ({claim.kind} {spread})."
