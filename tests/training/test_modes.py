"""Ways to train that must come to the same, or to nearly the same; what trains, at which rate, and what it costs."""

import json
import logging
from collections import defaultdict
from pathlib import Path

import numpy as np
import pytest
import torch


pytest.importorskip("trl")
pytest.importorskip("datasets")

from helpers.paths import GOLDEN  # noqa: E402
from helpers.tiny_models import make_image, make_model  # noqa: E402
from helpers.training_runs import (  # noqa: E402
    RECIPES,
    STAGES,
    assert_same_updates,
    logged,
    run,
    weights_of,
    with_images_inside,
)

from convllava_hf.errors import ConvLlavaError  # noqa: E402
from convllava_hf.training.trainable import is_projector, is_vision_tower  # noqa: E402


pytestmark = pytest.mark.slow


STAGE_2 = RECIPES / f"{STAGES[2]}.yaml"
WHOLE = {  # a step has all eight samples
    "max_steps": 3,
    "warmup_steps": 0,
    "per_device_train_batch_size": 8,
    "gradient_accumulation_steps": 1,
    "learning_rate": 1e-3,
    "save_strategy": "no",
}


@pytest.fixture(scope="module")
def start(converted_checkpoint) -> Path:
    return converted_checkpoint("stage1")


@pytest.fixture(scope="module")
def plain(start, tmp_path_factory):
    """The trainer of a run like which others must come out."""
    return run(STAGE_2, start, tmp_path_factory.mktemp("plain") / "out", **WHOLE)


def assert_same_run(ours, theirs, tolerance: float) -> None:
    np.testing.assert_allclose(logged(ours, "loss"), logged(theirs, "loss"), rtol=tolerance)
    np.testing.assert_allclose(logged(ours, "grad_norm"), logged(theirs, "grad_norm"), rtol=10 * tolerance)


@pytest.mark.parametrize("size, steps", [(4, 2), (2, 4), (1, 8), (3, 3)])
def test_accumulated_gradients_are_those_of_the_whole_batch(size, steps, plain, start, tmp_path):
    """By tokens, not by batches: the samples are of different lengths. With three times three the last is short."""
    more = {"per_device_train_batch_size": size, "gradient_accumulation_steps": steps}
    accumulated = run(STAGE_2, start, tmp_path / "out", **{**WHOLE, **more})
    assert_same_run(accumulated, plain, 1e-5)
    assert_same_updates(tmp_path / "out", Path(plain.args.output_dir), start, 1e-2)


@pytest.mark.parametrize("reentrant", ["false", "true"])
@pytest.mark.parametrize("stage", [1, 2, 3])
def test_checkpointed_activations_change_nothing(stage, reentrant, start, tmp_path):
    recipe = RECIPES / f"{STAGES[stage]}.yaml"
    off = run(recipe, start, tmp_path / "off", **WHOLE, gradient_checkpointing="false")
    kwargs = json.dumps({"use_reentrant": reentrant == "true"})
    on = run(
        recipe, start, tmp_path / "on", **WHOLE, gradient_checkpointing="true", gradient_checkpointing_kwargs=kwargs
    )
    assert not off.model.is_gradient_checkpointing and on.model.is_gradient_checkpointing
    assert_same_run(on, off, 1e-6)


def test_recipes_checkpoint_activations(plain):
    """TRL's default, which no recipe undoes; the largest ones would not fit otherwise."""
    assert plain.model.is_gradient_checkpointing
    assert all(stage.gradient_checkpointing for stage in plain.model.model.vision_tower.encoder.stages)
    assert all(layer.gradient_checkpointing for layer in plain.model.model.language_model.layers)


def test_bfloat16_s_losses_are_close(plain, start, tmp_path):
    narrow = run(STAGE_2, start, tmp_path / "out", **{**WHOLE, "bf16": "true"})
    assert narrow.args.bf16
    assert {one.dtype for one in narrow.model.parameters()} == {torch.float32}  # the weights stay as they are
    ours, theirs = logged(narrow, "loss"), logged(plain, "loss")
    assert ours != theirs
    np.testing.assert_allclose(ours, theirs, rtol=1e-2)


def test_weights_in_bfloat16_train_too(plain, start, tmp_path):
    narrow = run(STAGE_2, start, tmp_path / "out", **{**WHOLE, "bf16": "true", "dtype": "bfloat16"})
    assert {one.dtype for one in narrow.model.parameters()} == {torch.bfloat16}
    np.testing.assert_allclose(logged(narrow, "loss"), logged(plain, "loss"), rtol=3e-2)
    assert {weight.dtype for weight in weights_of(tmp_path / "out").values()} == {torch.bfloat16}


# --- what trains, and at which rate


@pytest.mark.parametrize("rates", [{"projector": 3e-3, "vision_tower": 1e-4}, {"projector": 0.0}, {}])
def test_each_part_moves_at_its_rate(rates, start, tmp_path):
    """AdamW's first step moves every weight with a gradient by the rate, whatever the gradient."""
    more = {f"{part}_learning_rate": rate for part, rate in rates.items()}
    trainer = run(STAGE_2, start, tmp_path / "out", **{**WHOLE, "max_steps": 1}, **more)
    before, after = weights_of(start), weights_of(tmp_path / "out")
    moved = defaultdict(float)
    for name, weight in after.items():
        part = "projector" if is_projector(name) else "vision_tower" if is_vision_tower(name) else "rest"
        moved[part] = max(moved[part], (weight - before[name]).abs().max().item())
    for part in ("projector", "vision_tower", "rest"):
        assert moved[part] == pytest.approx(rates.get(part, 1e-3), rel=1e-2), part
    found = {group["initial_lr"] for group in trainer.optimizer.param_groups}
    assert found == {1e-3, *rates.values()}


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_frozen_parts_stay_as_they_are_and_have_no_state(stage, start, tmp_path):
    trainer = run(RECIPES / f"{STAGES[stage]}.yaml", start, tmp_path / "out", **WHOLE)
    trained = {name: one for name, one in trainer.model.named_parameters() if one.requires_grad}
    before, after = weights_of(start), weights_of(tmp_path / "out")
    assert before.keys() == after.keys()
    assert {name for name in after if not torch.equal(before[name], after[name])} == set(trained)

    optimizer = trainer.optimizer.optimizer if hasattr(trainer.optimizer, "optimizer") else trainer.optimizer
    assert {id(one) for one in optimizer.state} == {id(one) for one in trained.values()}
    held = [one for group in optimizer.param_groups for one in group["params"]]
    assert {id(one) for one in held} == {id(one) for one in trained.values()}
    assert all(one.grad is None for one in trainer.model.parameters() if not one.requires_grad)


def test_the_table_of_what_trains_is_told(start, tmp_path, caplog):
    with caplog.at_level(logging.WARNING):
        run(RECIPES / f"{STAGES[1]}.yaml", start, tmp_path / "out", **{**WHOLE, "max_steps": 1})
    (table,) = [record.getMessage() for record in caplog.records if "What trains" in record.getMessage()]
    rows = {words[0]: words[1:] for line in table.splitlines()[1:] if (words := line.split())}
    whole = sum(weight.numel() for weight in weights_of(start).values())
    assert rows["all"][1] == f"{whole:,}"
    assert {name for name, row in rows.items() if row[0] not in ("0", "trainable")} == {
        "vision_tower.stages.4",
        "projector",
        "all",
    }


@pytest.mark.parametrize("kind", ["file", "split"])
def test_the_loss_is_measured_on_other_samples_too(kind, start, tmp_path):
    """Here on the same ones: before a step the loss is what the step then trains on."""
    more = {"eval_dataset_name": GOLDEN / "conversations.json"}
    if kind == "split":
        more = {"dataset_name": with_images_inside(tmp_path / "data", "train", "test"), "image_folder": None}
    trainer = run(STAGE_2, start, tmp_path / "out", **WHOLE, **more, eval_strategy="steps", eval_steps=1)
    evaluated = logged(trainer, "eval_loss")
    assert len(evaluated) == 3
    np.testing.assert_allclose(evaluated[:2], logged(trainer, "loss")[1:], rtol=1e-5)
    assert (tmp_path / "out" / "loss.png").exists()


def test_what_could_only_be_measured_on_itself_is_refused(start, tmp_path):
    with pytest.raises(ConvLlavaError, match="no split to evaluate on: name eval_dataset_name"):
        run(STAGE_2, start, tmp_path / "out", **WHOLE, eval_strategy="steps")


# --- what processes have to do alike


def test_every_batch_asks_for_the_same_weights_in_the_same_order(processor, monkeypatch):
    """With images or without: ZeRO-3 gathers weights when they are asked for, from all processes at once."""
    model = make_model().train()
    names = {id(module): name for name, module in model.named_modules()}
    own = torch.nn.Module.__getattr__
    asked = []

    def noted(self, name):
        value = own(self, name)
        if isinstance(value, torch.nn.Parameter):
            asked.append((names[id(self)], name))
        return value

    monkeypatch.setattr(torch.nn.Module, "__getattr__", noted)
    orders = []
    for text, images in (("<s>USER: <image>\nWhat? ASSISTANT: A sign.</s>", [make_image()]), ("<s>Hi.</s>", None)):
        asked.clear()
        inputs = processor(text=text, images=images, return_tensors="pt")
        model(**inputs, labels=inputs["input_ids"])
        orders.append(list(asked))
    assert len(orders[0]) > 50
    assert orders[0] == orders[1]


# --- memory


class Saved:
    """Counts the tensors that are kept for the backward pass while a module runs, by the module's part of the model.

    Weights are not counted: they are there anyway.
    """

    def __init__(self, model, modules: dict):
        self.counts = dict.fromkeys(modules, 0)
        self.shapes = []
        self.weights = {one.data_ptr() for one in model.parameters()}
        self.inside = []
        self.handles = []
        for name, module in modules.items():
            self.handles.append(module.register_forward_pre_hook(lambda *_, name=name: self.inside.append(name)))
            self.handles.append(module.register_forward_hook(lambda *_: self.inside.pop() and None))
        self.hooks = torch.autograd.graph.saved_tensors_hooks(self.pack, lambda tensor: tensor)

    def pack(self, tensor):
        if tensor.data_ptr() not in self.weights:
            self.shapes.append(tuple(tensor.shape))
            for name in self.inside:
                self.counts[name] += 1
        return tensor

    def __enter__(self):
        self.hooks.__enter__()
        return self

    def __exit__(self, *details):
        self.hooks.__exit__(*details)
        for handle in self.handles:
            handle.remove()


def saved_in_a_step(trainer) -> Saved:
    """What a forward pass of the trainer keeps, by stages of the tower, the projector and the language model."""
    core = trainer.accelerator.unwrap_model(trainer.model)
    core = (core.get_base_model() if hasattr(core, "get_base_model") else core).model
    parts = {f"stage {index}": stage for index, stage in enumerate(core.vision_tower.encoder.stages)}
    parts |= {"stem": core.vision_tower.embeddings, "projector": core.multi_modal_projector}
    parts |= {"language model": core.language_model}
    trainer.model.train()
    batch = trainer._prepare_inputs(next(iter(trainer.get_train_dataloader())))
    with Saved(trainer.model, parts) as saved:
        loss = trainer.compute_loss(trainer.model, batch)
    assert loss.requires_grad
    saved.positions = batch["input_ids"].numel()
    return saved


KEEPING = {  # parts that keep something for the backward pass
    1: {"stage 4", "projector", "language model"},
    2: {"stage 2", "stage 3", "stage 4", "projector", "language model"},
    3: {"projector", "language model"},
    "lora": {"projector", "language model"},
}


@pytest.mark.parametrize("checkpointed", ["false", "true"])
@pytest.mark.parametrize("stage", KEEPING)
def test_frozen_parts_keep_no_activations(stage, checkpointed, start, tmp_path):
    """Those before everything that trains; what comes behind it needs them for the gradients that pass through."""
    recipe = RECIPES / f"{STAGES.get(stage, stage)}.yaml"
    few = {**WHOLE, "max_steps": 1, "per_device_train_batch_size": 2, "gradient_checkpointing": checkpointed}
    saved = saved_in_a_step(run(recipe, start, tmp_path / "out", **few))
    assert {name for name, count in saved.counts.items() if count} == KEEPING[stage]


def test_checkpointing_keeps_a_part_of_the_activations(start, tmp_path):
    counts = {}
    for checkpointed in ("true", "false"):
        few = {**WHOLE, "max_steps": 1, "gradient_checkpointing": checkpointed}
        counts[checkpointed] = saved_in_a_step(run(STAGE_2, start, tmp_path / checkpointed, **few)).counts
    for part in ("stage 2", "stage 3", "stage 4", "language model"):
        assert counts["true"][part] < counts["false"][part] / 2, part


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_logits_are_never_kept(stage, start, tmp_path):
    """Nothing as wide as the vocabulary is, of as many rows as there are positions; nor does the head itself run."""
    trainer = run(RECIPES / f"{STAGES[stage]}.yaml", start, tmp_path / "out", **{**WHOLE, "max_steps": 1})
    ran = []
    trainer.model.lm_head.register_forward_hook(lambda *_: ran.append(True))
    saved = saved_in_a_step(trainer)
    assert not ran
    vocabulary = trainer.model.config.text_config.vocab_size
    assert saved.positions > 1000
    assert not [shape for shape in saved.shapes if shape[-1:] == (vocabulary,) and len(shape) > 1 and shape[0] > 1]
