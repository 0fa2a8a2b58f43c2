"""`convllava quickstart`: a ConvLLaVA's whole life on any machine, from nothing to scores."""

import functools
import os
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from importlib import resources
from pathlib import Path
from typing import Any

from ..utils.environment import cpu_name, versions_of
from ..utils.json_files import write_json_rows
from ..utils.logging_utils import disable_progress_bars
from .language import KINDS, Mix
from .progress import Line, OnStep, logs_to
from .steps import Run, run_jobs
from .world import World


SIDE = 256  # pixels: 4 x 4 visual tokens at stride 64
EXTRA_STAGE_DEPTH, EXTRA_STAGE_WIDTH = 2, 192
# What is said about the scenes of a stage. Captions come first and without boxes: as long as the language model cannot
# tell from a visual token what is there, it does not learn either where.
MIXES = {
    "stage1": Mix(captions=1.0),
    "stage2": Mix(grounded_captions=0.05, boxes=0.05, boxes_at_end=2),
    "stage3": Mix(boxes=0.2, boxes_at_end=1),
}
STAGES = tuple(MIXES)
TITLES = {
    "vision tower": "stage 0: vision tower",
    "language model": "stage 0: language model",
    "data": "drawing scenes",
    "stage 1": "stage 1: projector",
    "stage 2": "stage 2: pretraining",
    "stage 3": "stage 3: instructions",
    "evaluation": "asking about new scenes",
}
_SAMPLES = 12
PACKAGES = ("convllava-hf", "torch", "transformers", "trl", "datasets", "scikit-learn", "pillow")

Job = Callable[[OnStep], None]


@dataclass(frozen=True)
class Plan:
    """How much of everything.

    Args:
        tower_steps, language_steps: of stage 0.
        stage1_scenes, stage2_scenes, stage3_scenes: training samples of the three stages, each seen once.
        test_scenes: that are asked about in the end, at most one question of each kind each.
    """

    tower_steps: int = 1600
    language_steps: int = 700
    stage1_scenes: int = 4000
    stage2_scenes: int = 19000
    stage3_scenes: int = 1600
    test_scenes: int = 600


def open_run(folder: str | Path, *, seed: int = 0, plan: Plan | None = None) -> Run:
    """A quickstart's folder: a new one, or that of a run which was interrupted.

    Args:
        folder: gets `model`, `results.json`, `samples` and what led to them.
        seed: of all that is drawn: weights, scenes, questions.

    Raises:
        ConvLlavaError: the folder holds something else.
    """
    return Run(Path(folder), {"seed": seed, **asdict(plan or Plan())})


def quickstart(run: Run, device: str | None = "cpu") -> dict[str, Any]:
    """Makes, trains and judges a miniature ConvLLaVA, as far as the run has not come yet.

    Args:
        device: that computes, `cpu` or `cuda`; `None` is `cuda` where there is one. The CPU draws the scenes anyway.

    Returns:
        What is in `results.json`.
    """
    settings = dict(run.record["settings"])
    seed, plan = settings.pop("seed"), Plan(**settings)
    device = device or _best_device()
    with logs_to(run.folder / "quickstart.log"), run.clock("total"):
        prepare(run, seed, plan, device)
        if not run.is_done("assemble"):
            with run.step("assemble"):
                assemble_model(run.folder / "assembled", stage0=run.folder / "stage0", seed=seed)
        folders = [run.folder / name for name in ("assembled", "stage1", "stage2", "model")]
        for stage in (1, 2, 3):
            train_stage(run, stage, start=folders[stage - 1], output=folders[stage], seed=seed, device=device)
        judge(run, run.folder / "model", seed=seed, scenes=plan.test_scenes, device=device)
    results = {
        "seed": seed,
        "scenes": plan.test_scenes,
        **run.record["results"]["evaluation"],
        "seconds": run.record["seconds"],
        "losses": run.record["losses"],
        "versions": versions_of(PACKAGES),
        "machine": machine_name(device),
    }
    write_json_rows(run.folder / "results.json", results)
    return results


def _best_device() -> str:
    import torch

    return "cuda" if torch.cuda.is_available() else "cpu"


def prepare(run: Run, seed: int, plan: Plan, device: str = "cpu") -> None:
    """Stage 0 and the training data, none of which needs the others, at the same time."""
    scenes = {"stage1": plan.stage1_scenes, "stage2": plan.stage2_scenes, "stage3": plan.stage3_scenes}
    jobs = stage0_jobs(run.folder / "stage0", seed, plan.tower_steps, plan.language_steps, device=device)
    jobs["data"] = functools.partial(draw_data, run.folder / "data", scenes, seed, World(), MIXES)
    run_in_lines(run, jobs)


def stage0_jobs(
    folder: Path,
    seed: int,
    tower_steps: int,
    language_steps: int,
    world: World | None = None,
    tower_sizes: tuple[int, int] | None = None,
    boxes: bool = True,
    device: str = "cpu",
) -> dict[str, Job]:
    """What trains the stand-ins for CLIP's tower and for Vicuna; see `pretraining` for the arguments."""
    from .pretraining import train_language_model, train_tower

    common = {"seed": seed, "device": device}
    tower = {"steps": tower_steps, "sizes": tower_sizes, **common}
    language = {"steps": language_steps, "world": world, "boxes": boxes, **common}
    jobs = {
        "vision tower": functools.partial(train_tower, folder / "vision_tower", **tower),
        "language model": functools.partial(train_language_model, folder / "language_model", **language),
    }
    return {name: functools.partial(on_one_core, job) for name, job in jobs.items()}


def run_in_lines(run: Run, jobs: Mapping[str, Job]) -> None:
    """Runs steps that do not need each other at the same time, one for each core, each with its own line."""
    jobs = {name: job for name, job in jobs.items() if not run.is_done(name)}
    losses: dict[str, list[list[float]]] = {name: [] for name in jobs}
    lines: dict[str, Line] = {}

    def on_event(name: str, event: tuple | None) -> None:
        if event is None:
            line = lines.pop(name)
            line.close()
            run.add_seconds(name, line.seconds)
            if losses[name]:
                run.set_losses(name, losses[name])
            run.finish(name)
            return
        if name not in lines:
            free = min(set(range(len(lines) + 1)).difference(line.position for line in lines.values()))
            unit = "scene" if name.endswith("data") else "step"
            lines[name] = Line(TITLES.get(name, name), position=free, unit=unit)
        lines[name].update(*event)
        if len(event) == 3:  # with a loss
            losses[name].append([event[0], round(event[2], 4)])

    try:
        run_jobs(jobs, on_event, at_once=os.cpu_count() or 1)
    finally:
        for line in lines.values():
            line.bar.close()


def assemble_model(
    output: Path, *, stage0: Path, seed: int, side: int = SIDE, extra_stage_depth: int = EXTRA_STAGE_DEPTH
) -> None:
    """The tower with a fresh stage, a fresh projector and the language model, as one checkpoint."""
    from ..convert import assemble

    assemble(
        output,
        vision=stage0 / "vision_tower",
        text=stage0 / "language_model",
        resolution=side,
        extra_stage_depth=extra_stage_depth,
        extra_stage_width=EXTRA_STAGE_WIDTH,
        seed=seed,
        overwrite=True,
        progress=False,
    )


def train_stage(run: Run, stage: int, *, start: Path, output: Path, seed: int, device: str = "cpu") -> None:
    """A step of a run that is one of the paper's stages."""
    name = f"stage {stage}"
    if run.is_done(name):
        return
    with run.step(name), Line(TITLES[name]) as line:
        data = run.folder / "data" / f"stage{stage}"
        losses = train_by_recipe(stage, start, output, data, seed, on_step=line.update, device=device)
        run.set_losses(name, losses)


def train_by_recipe(
    stage: int,
    start: Path,
    output: Path,
    data: Path,
    seed: int,
    on_step: OnStep,
    options: Sequence[str] = (),
    device: str = "cpu",
) -> list[list[float]]:
    """Runs one of the recipes in `recipes/miniature`, as `convllava train` does, or goes on with it.

    Args:
        start, output: checkpoints before and after.
        on_step: called with the steps done, all steps and, now and then, the loss.
        options: more of the command line, over the recipe.
        device: `cpu`, which the recipes are for, or `cuda`.

    Returns:
        `[step, loss]`, all that was logged.
    """
    from ..train import main
    from .callbacks import TrainingProgressCallback

    recipe = resources.files("convllava_hf.miniature.recipes") / f"stage{stage}.yaml"
    with resources.as_file(recipe) as path:
        arguments = ["--config", path, "--model_name_or_path", start, "--output_dir", output, "--dataset_name", data]
        arguments += ["--seed", seed, "--disable_tqdm", "true", "--resume_from_checkpoint", "true", *options]
        if device != "cpu":  # whose cores workers would take from the model
            arguments += ["--use_cpu", "false", "--dataloader_num_workers", min(8, (os.cpu_count() or 2) // 2)]
        trainer = main([str(argument) for argument in arguments], callbacks=[TrainingProgressCallback(on_step)])
    for checkpoint in output.glob("checkpoint-*"):  # only to go on from
        shutil.rmtree(checkpoint)
    return [[row["step"], row["loss"]] for row in trainer.state.log_history if "loss" in row]


def judge(run: Run, checkpoint: Path, *, seed: int, scenes: int, device: str = "cpu") -> None:
    """Loads a checkpoint as anyone would, and asks it about scenes that it has not seen."""
    if run.is_done("evaluation"):
        return
    import torch

    from ..inference.loading import choose_dtype, load_processor
    from ..modeling.modeling_convllava import ConvLlavaForConditionalGeneration
    from .scoring import ask_about_scenes, chance, score

    with run.step("evaluation"), Line(TITLES["evaluation"], unit="question") as line:
        processor = load_processor(checkpoint)
        dtype = choose_dtype(torch.device(device))
        model = ConvLlavaForConditionalGeneration.from_pretrained(checkpoint, dtype=dtype).eval().to(device)
        answered = ask_about_scenes(
            model, processor, World(), scenes=scenes, seed=seed, side=SIDE, on_step=line.update
        )
        tokens = count_tokens(processor)
        shape = {"parameters": _parameters(model), "resolution": SIDE, "visual_tokens": tokens}
        samples = _save_samples(answered, run.folder)
        scores = {**score(answered), "chance": chance(World(), seed=seed)}
        run.keep("evaluation", {**scores, "model": shape, "samples": samples})


def count_tokens(processor) -> int:
    """Visual tokens of one of the miniature's images."""
    return processor._get_num_multimodal_tokens(image_sizes=[(SIDE, SIDE)]).num_image_tokens[0]


def machine_name(device: str) -> str:
    """What the figures were measured on: the processor, and before it the GPU if there is one."""
    if device == "cpu":
        return cpu_name()
    import torch

    return f"{torch.cuda.get_device_name(device)}; {cpu_name()}"


def draw_data(
    folder: Path, scenes: Mapping[str, int], seed: int, world: World, mixes: Mapping[str, Mix], on_step: OnStep
) -> None:
    """Draws the training samples of some of the stages.

    Args:
        scenes: their number by stage, `stage1` to `stage3`.
        mixes: what is said about them, by stage.
    """
    from .scene_dataset import write_samples

    done = 0
    for stage, size in scenes.items():
        write_samples(
            folder / stage,
            world,
            size=size,
            seed=[seed, STAGES.index(stage) + 1],
            mix=mixes[stage],
            side=SIDE,
            on_scene=lambda drawn, before=done: on_step(before + drawn, sum(scenes.values())),
        )
        done += size


def on_one_core(job: Job, on_step: OnStep) -> None:
    """Runs a job by one thread: the jobs share the machine, and steps this small gain little from more."""
    import torch

    torch.set_num_threads(1)
    disable_progress_bars()
    job(on_step)


def _parameters(model) -> dict[str, int]:
    parts = {
        "vision tower": model.model.vision_tower,
        "projector": model.model.multi_modal_projector,
        "language model": model.model.language_model,
        "head": model.lm_head,
    }
    return {name: sum(parameter.numel() for parameter in part.parameters()) for name, part in parts.items()}


def _save_samples(answered, folder: Path) -> list[dict[str, Any]]:
    """Two questions of each kind with their images, from scenes in order, however they were answered."""
    from .drawing import draw

    each = _SAMPLES // len(KINDS)
    chosen = []
    for number, kind in enumerate(KINDS):
        rows = [row for row in answered if row.question.kind == kind]
        chosen += rows[number * each : (number + 1) * each] or rows[:each]
    (folder / "samples").mkdir(exist_ok=True)
    samples = []
    for number, row in enumerate(chosen):
        name = f"samples/{number:02}.png"
        draw(row.scene, SIDE).save(folder / name)
        question = {"kind": row.question.kind, "question": row.question.text}
        answers = {"answer": row.answer, "truth": row.question.answer, "blind": row.blind, "correct": row.correct}
        samples.append({"image": name, **question, **answers})
    return samples
