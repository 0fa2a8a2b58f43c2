"""Recipes that cannot work: each ends in one line, before weights are read; whatever is in them."""

import os
import random
import time
from pathlib import Path

import pytest
import yaml


pytest.importorskip("trl")
pytest.importorskip("datasets")

from helpers.paths import GOLDEN  # noqa: E402

from convllava_hf import cli  # noqa: E402
from convllava_hf import train as script  # noqa: E402
from convllava_hf.errors import ConvLlavaError  # noqa: E402
from convllava_hf.training.arguments import make_parser  # noqa: E402
from convllava_hf.training.recipe import read_recipe  # noqa: E402


class ReachedWeights(Exception):
    """All that comes before the weights are read has passed."""


@pytest.fixture
def recipe(checkpoint, tmp_path, monkeypatch):
    """Writes a recipe that works but for the changes, and takes it up to the weights."""

    def stop(*args, **kwargs):
        raise ReachedWeights

    monkeypatch.setattr(script, "_load_model", stop)
    monkeypatch.chdir(tmp_path)
    good = {
        "model_name_or_path": str(checkpoint),
        "output_dir": str(tmp_path / "out"),
        "dataset_name": str(GOLDEN / "conversations.json"),
        "image_folder": str(GOLDEN / "images"),
        "trainable": ["projector"],
        "use_cpu": True,
        "bf16": False,
        "report_to": "none",
        "disable_tqdm": True,
    }

    def take(changes: dict | str | bytes, *options: str) -> None:
        path = tmp_path / "recipe.yaml"
        if isinstance(changes, dict):
            values = {key: value for key, value in {**good, **changes}.items() if value is not MISSING}
            path.write_text(yaml.safe_dump(values))
        else:
            path.write_bytes(changes if isinstance(changes, bytes) else changes.encode())
        script.main(["--config", str(path), *options])

    return take


MISSING = object()
NAN, INFINITE = float("nan"), float("inf")
LORA = {"use_peft": True, "trainable": MISSING}

REFUSED = [
    ({"model_name_or_path": "no/such/folder"}, "There is no folder 'no/such/folder'"),
    ({"model_name_or_path": "checkpoints/sft"}, "There is no folder 'checkpoints/sft'"),
    ({"model_name_or_path": str(GOLDEN / "checkpoint-stage3")}, "convllava convert"),
    ({"model_name_or_path": str(GOLDEN)}, "has no config.json"),
    ({"model_name_or_path": str(GOLDEN / "conversations.json")}, "is a file"),
    ({"model_name_or_path": 7}, "expected text"),
    ({"report_to": "wandbb"}, "report_to is 'wandbb'"),
    ({"report_to": ["none", "tensorbord"]}, "report_to is"),
    ({"per_device_train_batch_size": 0}, "per_device_train_batch_size is 0; expected a number from 1 up"),
    ({"per_device_train_batch_size": -4}, "is -4"),
    ({"per_device_train_batch_size": 2.5}, "expected a whole number"),
    ({"per_device_train_batch_size": "many"}, "expected a whole number"),
    ({"per_device_train_batch_size": True}, "expected a whole number"),
    ({"per_device_train_batch_size": None}, "expected a whole number"),
    ({"per_device_train_batch_size": 10**30}, "per_device_train_batch_size is"),
    ({"gradient_accumulation_steps": 0}, "gradient_accumulation_steps is 0"),
    ({"max_steps": 0}, "max_steps is 0"),
    ({"max_steps": -7}, "max_steps is -7"),
    ({"num_train_epochs": 0}, "num_train_epochs is 0"),
    ({"num_train_epochs": NAN}, "num_train_epochs is nan"),
    ({"learning_rate": NAN}, "learning_rate is nan"),
    ({"learning_rate": -1e-4}, "learning_rate is -0.0001"),
    ({"learning_rate": INFINITE}, "learning_rate is inf"),
    ({"logging_steps": INFINITE}, "infinity"),
    ({"learning_rate": "fast"}, "expected a number"),
    ({"learning_rate": [1e-4]}, "learning_rate in the recipe is a list"),
    ({"projector_learning_rate": -1.0}, "projector_learning_rate is -1.0"),
    ({"weight_decay": NAN}, "weight_decay is nan"),
    ({"adam_beta2": 1.0}, "adam_beta2 is 1.0"),
    ({"warmup_steps": -1}, "warmup_steps"),
    ({"seed": -1}, "seed is -1"),
    ({"seed": 2**40}, "seed is"),
    ({"dataloader_num_workers": -1}, "dataloader_num_workers is -1"),
    ({"dataloader_num_workers": 100_000}, "dataloader_num_workers is 100000"),
    ({"save_steps": 0}, "save_steps"),
    ({"max_length": 0}, "max_length is 0"),
    ({"max_length": "long"}, "expected a whole number or null"),
    ({"attn_implementation": "fast"}, "attn_implementation 'fast'"),
    ({"attn_implementation": "flash_attention_2"}, "attn_implementation 'flash_attention_2'"),
    ({"dtype": "float64"}, "expected one of auto, bfloat16, float16, float32"),
    ({"dtype": "bfloat1"}, "Did you mean bfloat16?"),
    ({"optim": "adam"}, "expected one of adamw_torch"),
    ({"optim": "lomo"}, "lomo"),
    ({"optim": "adamw_torch", "optim_args": "betas"}, "optim"),
    ({"lr_scheduler_type": "cosinus"}, "Did you mean cosine?"),
    ({"lr_scheduler_type": "cosine_with_min_lr"}, "lr_scheduler_type 'cosine_with_min_lr'"),
    ({"lr_scheduler_kwargs": {"nonsense": 1}}, "lr_scheduler_kwargs"),
    ({"save_strategy": "sometimes"}, "expected one of no, steps, epoch, best"),
    ({"learning_rat": 1e-4}, "Did you mean learning_rate"),
    ({"warmup_ratio": 0.03}, "the key 'warmup_ratio'"),
    ({3: 4}, "the key 3"),
    ({"trainable": ["projectr"]}, "matches nothing in this model"),
    ({"trainable": []}, "trainable"),
    ({"trainable": 5}, "trainable in the recipe is 5"),
    ({"dataset_name": ["a.json"]}, "dataset_name in the recipe is a list"),
    ({"dataset_name": "none.json"}, "none.json"),
    ({"datasets": ["a.json"], "dataset_name": MISSING}, "datasets in the recipe is a list"),
    ({"bf16": "perhaps"}, "expected true or false"),
    ({"output_dir": "recipe.yaml"}, "is a file"),
    ({"output_dir": "recipe.yaml/out"}, "output_dir"),
    ({"output_dir": "x" * 5000}, "output_dir"),
    ({"output_dir": "a\0b"}, "output_dir"),
    ({"env": ["A=1"]}, "`env`"),
    ({"resume_from_checkpoint": "nowhere"}, "nowhere cannot be resumed from"),
    ({"load_in_4bit": True}, "set use_peft"),
    ({"use_liger_kernel": True}, "liger-kernel"),
    ({**LORA, "lora_r": 0}, "lora_r is 0"),
    ({**LORA, "lora_dropout": 1.5}, "lora_dropout is 1.5"),
    ({**LORA, "lora_target_modules": ["nonsense"]}, "The adapter cannot be made"),
    ({**LORA, "lora_task_type": "SEEING"}, "The adapter cannot be made"),
    ({**LORA, "load_in_4bit": True, "load_in_8bit": True}, "8 bit and 4 bit"),
    ({**LORA, "load_in_4bit": True, "bnb_4bit_quant_storage": "nonsense"}, "cannot be quantized"),
    ({"image_aspect_ratio": "stretch"}, "stretch"),
    ({"chat_template_path": str(GOLDEN / "checkpoint-stage3")}, "expected a .jinja file"),
    ({"min_pixels": 0}, "min_pixels is 0"),
    ("", "No data"),
    ("just words", "not a mapping"),
    ("a: [1, 2", "not valid YAML"),
    ("a: !!python/object/apply:os.system ['true']", "not valid YAML"),
    ("a: &a [*a]", "a part of itself"),
    ("seed: " + "9" * 5000, "cannot be used"),
    ("a: " + "[" * 5000, "cannot be used"),
    (b"\xff\xd8\xff\xe0\x00\x10JFIF", "not UTF-8 text"),
    (b"a: \x07", "not valid YAML"),
    ("#" * 2**21, "too many for a recipe"),
]


@pytest.mark.parametrize(("changes", "words"), REFUSED, ids=range(len(REFUSED)))
def test_what_cannot_work_is_refused_in_one_line(changes, words, recipe):
    with pytest.raises(ConvLlavaError) as refused:
        recipe(changes)
    message = str(refused.value)
    assert words in message and "\n" not in message and len(message) < 1000


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"learning_rate": "2e-5"},  # YAML 1.1 reads 2e-5 as text
        {"save_strategy": False},  # and `no` as false
        {"max_length": None, "lr_scheduler_type": "cosine_with_min_lr", "lr_scheduler_kwargs": {"min_lr": 1e-6}},
        {"trainable": "projector", "attn_implementation": "eager", "optim": "adafactor"},
        {"report_to": [], "warmup_steps": 0.03, "save_total_limit": -1},
        LORA,
        {"env": {"CONVLLAVA_TEST_RECIPE": 1}},
    ],
)
def test_what_works_comes_to_the_weights(changes, recipe, monkeypatch):
    monkeypatch.setenv("CONVLLAVA_TEST_RECIPE", "0")
    with pytest.raises(ReachedWeights):
        recipe(changes)
    assert os.environ["CONVLLAVA_TEST_RECIPE"] == ("1" if "env" in changes else "0")


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--learning_rate", "fast"], "invalid float value"),
        (["--learning_rat", "1"], "Did you mean learning_rate"),
        (["--nonsense", "1"], "The options have the key 'nonsense'"),
        (["--per_device_train_batch_size", "0"], "per_device_train_batch_size is 0"),
        (["--learning_rate", "nan"], "learning_rate is nan"),
        (["--dtype", "float8_e5m2"], "float8_e5m2"),
        (["--report_to", "wandbb"], "report_to is 'wandbb'"),
    ],
)
def test_options_are_looked_at_as_recipes_are(options, words, recipe):
    with pytest.raises(ConvLlavaError) as refused:
        recipe({}, *options)
    assert words in str(refused.value)


def test_a_tracker_that_is_not_installed_is_refused(recipe, monkeypatch):
    monkeypatch.setattr(
        "convllava_hf.training.recipe_checks.get_available_reporting_integrations", lambda: ["tensorboard"]
    )
    with pytest.raises(ConvLlavaError, match="report_to is 'wandb', which is not installed"):
        recipe({"report_to": "wandb"})
    with pytest.raises(ReachedWeights):
        recipe({"report_to": "tensorboard"})


def test_the_command_ends_with_code_2(capsys, tmp_path):
    (tmp_path / "recipe.yaml").write_text("trainable: [projector]\ndataset_name: x\nuse_cpu: true\nbf16: false\n")
    assert cli.main(["train", "--config", str(tmp_path / "recipe.yaml"), "--model_name_or_path", "no/model"]) == 2
    said = capsys.readouterr().err.strip().splitlines()
    assert said[-1].startswith("convllava: error: There is no folder 'no/model'")


# --- resolution


def test_the_resolution_replaces_its_name_in_texts(tmp_path):
    path = tmp_path / "recipe.yaml"
    path.write_text(
        "resolution: 768\noutput_dir: runs-{resolution}/{resolution}\nuse_cpu: true\nbf16: false\n"
        "datasets:\n  - {path: 'data-{resolution}/a.json', weight: 1}\n"
    )

    def parsed(*options: str) -> tuple:
        data, training, _ = make_parser().parse_args_and_config(["--config", str(path), *options])
        return data.resolution, training.output_dir, data.datasets

    assert parsed() == (768, "runs-768/768", [{"path": "data-768/a.json", "weight": 1}])
    expected = (1536, "runs-1536/1536", [{"path": "data-1536/a.json", "weight": 1}])
    assert parsed("--resolution", "1536") == parsed("--resolution=1536") == expected
    assert parsed("--output_dir", "{resolution}/out")[1] == "768/out"


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"output_dir": "runs-{resolution}"}, "output_dir is 'runs-{resolution}', but resolution is not set"),
        ({"resolution": "large"}, "resolution in the recipe is 'large'; expected a whole number"),
        ({"resolution": 0}, "resolution is 0; expected a number from 1 up"),
        ({"resolution": 256}, "sees squares of 128 x 128 pixels: give --resolution 128, or name a checkpoint"),
    ],
)
def test_a_resolution_that_cannot_be_is_refused(recipe, changes, message):
    with pytest.raises(ConvLlavaError, match=message):
        recipe(changes)


def test_the_resolution_of_the_checkpoint_is_taken_and_native_images_have_none(recipe):
    for changes in ({"resolution": 128}, {"resolution": 1536, "preset": "large"}):
        with pytest.raises(ReachedWeights):
            recipe(changes)


# --- aliases


def test_aliases_that_multiply_are_refused_at_once(tmp_path):
    lines = ["a0: &a0 [x, x, x, x, x, x, x, x, x, x]"]
    lines += [f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 10)}]" for n in range(1, 30)]
    path = tmp_path / "recipe.yaml"
    path.write_text("\n".join(lines))
    start = time.monotonic()
    with pytest.raises(ConvLlavaError, match="with its aliases written out"):
        read_recipe(path)
    assert time.monotonic() - start < 5
    merged = ["m0: &m0 {k: 1}"]
    merged += [f"m{n}: &m{n} {{<<: [{', '.join([f'*m{n - 1}'] * 10)}]}}" for n in range(1, 30)]
    path.write_text("\n".join(merged))
    with pytest.raises(ConvLlavaError, match="with its aliases written out"):
        read_recipe(path)


def test_ordinary_aliases_are_taken(tmp_path):
    path = tmp_path / "recipe.yaml"
    path.write_text("image_folder: &folder data\ndatasets:\n  - {path: a.json, image_folder: *folder}\n")
    assert read_recipe(path) == yaml.safe_load(path.read_text())


@pytest.mark.parametrize("kind", ["folder", "fifo", "null"])
def test_what_is_no_file_is_no_recipe(kind, tmp_path):
    path = tmp_path / "recipe.yaml"
    if kind == "folder":
        path.mkdir()
    elif kind == "fifo":
        os.mkfifo(path)
    else:
        path = Path(os.devnull)
    with pytest.raises(ConvLlavaError, match="takes a recipe file"):
        read_recipe(path)


# --- mutations


VALUES = [None, True, "", "x", "\0", "-1", "nan", -1, 0, 0.5, 10**12, NAN, INFINITE, [], [None], [[]], {}, {"a": 1}]


def test_any_value_of_any_key_ends_in_one_line_or_comes_to_the_weights(recipe):
    """A draw of all keys and of values of every kind, the same in every run."""
    drawn = random.Random(15)
    keys = sorted({action.dest for action in make_parser()._actions} - {"help", "config"})
    # They reach out of this process (or of this test), and are not about values.
    out = {"push_to_hub", "deepspeed", "ddp_backend", "local_rank", "torch_compile", "full_determinism", "tf32"}
    for key in drawn.sample([key for key in keys if key not in out], 100):
        value = drawn.choice(VALUES)
        try:
            recipe({key: value})
        except (ConvLlavaError, ReachedWeights) as error:
            assert "\n" not in str(error), (key, value)
        except BaseException as error:
            raise AssertionError(f"{key}: {value!r}") from error
