"""Recipes do not rot: each is parsed strictly, and says what the paper says."""

import importlib.util
import re
import shlex
from argparse import Namespace
from fnmatch import fnmatchcase
from pathlib import Path

import pytest
import yaml


trl = pytest.importorskip("trl")
peft = pytest.importorskip("peft")
pytest.importorskip("datasets")

from helpers.paths import ROOT  # noqa: E402
from helpers.tiny_models import make_config, make_model  # noqa: E402

from convllava_hf import cli  # noqa: E402
from convllava_hf.data.mixture import ENTRY_KEYS  # noqa: E402
from convllava_hf.modeling.configuration_convllava import PRESETS  # noqa: E402
from convllava_hf.training.arguments import LORA_TARGETS, check_arguments, make_parser  # noqa: E402
from convllava_hf.training.launch import launch_arguments  # noqa: E402
from convllava_hf.training.trainable import set_trainable  # noqa: E402


RECIPES = sorted((ROOT / "recipes").glob("convllava-*/*.yaml"))
STAGED = [path for path in RECIPES if path.name.startswith("stage")]
ADAPTERS = [path for path in RECIPES if path.stem in ("lora", "qlora")]
MINIATURE = sorted((ROOT / "recipes" / "miniature").glob("*.yaml"))
RESOLUTIONS = {"convllava-7b": (768, 1024, 1536), "convllava-1.5b": (768,)}
# TRL's accelerate configs that the recipes and their page name, and accelerate's names for what they do.
ACCELERATE = {
    "single_gpu": "NO",
    "multi_gpu": "MULTI_GPU",
    "fsdp2": "FSDP",
    "zero2": "DEEPSPEED",
    "zero3": "DEEPSPEED",
}

# arXiv 2405.15738, table 15; weight decay and length from the original's scripts.
PAPER = {
    1: {"learning_rate": 3e-4, "batch": 256, "trains": {"projector", "vision_tower.stages.4"}},
    2: {
        "learning_rate": 2e-5,
        "batch": 256,
        "trains": {"projector", *(f"vision_tower.stages.{n}" for n in (2, 3, 4)), "language_model", "lm_head"},
    },
    3: {"learning_rate": 2e-5, "batch": 128, "trains": {"projector", "language_model", "lm_head"}},
}
COMMON = {
    "num_train_epochs": 1, "lr_scheduler_type": "cosine", "warmup_steps": 0.03, "weight_decay": 0.0,
    "max_length": 2048, "assistant_only_loss": True, "bf16": True, "adam_beta1": 0.9, "adam_beta2": 0.999,
}  # fmt: skip
# Keys that not every supported version knows: those of older recipes, those that go in transformers 6 and TRL 2, and
# those that transformers 5.18 does not have yet.
GONE = {"torch_dtype", "warmup_ratio", "overwrite_output_dir", "max_seq_length", "evaluation_strategy", "tokenizer"}
DEPRECATED = {"gradient_checkpointing", "gradient_checkpointing_kwargs", "use_liger_kernel", "pad_token"}
NEWER = {"activation_checkpointing", "activation_checkpointing_kwargs"}


def name_of(path: Path) -> str:
    return f"{path.parent.name}/{path.stem}"


def each(paths):
    return pytest.mark.parametrize("path", paths, ids=name_of)


def parse(path: Path, *more: str, parser=None):
    """Every key known, on a machine without a GPU."""
    return (parser or make_parser()).parse_args_and_config(["--config", str(path), "--use_cpu", "true", *more])


def values(path: Path) -> dict:
    return yaml.safe_load(path.read_text("utf-8"))


def stage_of(path: Path) -> int:
    return int(path.name[len("stage")])


@pytest.fixture(scope="module")
def cost():
    """benchmarks/recipe_cost.py, which knows the shapes of the recipes' models."""
    spec = importlib.util.spec_from_file_location("recipe_cost", ROOT / "benchmarks" / "recipe_cost.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def models(cost) -> dict:
    """Models of the recipes' own shapes, without weights, by the name of the recipe's folder."""
    return {"convllava-7b": cost.empty_model(), "convllava-1.5b": cost.empty_model(cost.QWEN2_5_1_5B)}


def model_of(path: Path, models: dict):
    return models[path.parent.name]


def test_there_is_a_recipe_for_everything():
    stages = {"stage1_projector", "stage2_pretrain", "stage3_instruct"}
    assert {path.stem for path in RECIPES if path.parent.name == "convllava-7b"} == stages | {"lora", "qlora"}
    assert {path.stem for path in RECIPES if path.parent.name == "convllava-1.5b"} == stages | {"lora"}


# --- the miniature


@each(MINIATURE)
def test_the_miniature_trains_what_the_paper_does(path):
    data, training, model = parse(path)
    check_arguments(data, training, model)
    assert not GONE & set(values(path))
    parts = {"projector", *(f"vision_tower.stages.{n}" for n in range(5)), "language_model", "lm_head"}
    trains = {part for part in parts if any(fnmatchcase(part, pattern) for pattern in training.trainable)}
    assert trains == PAPER[stage_of(path)]["trains"]
    head = path.read_text("utf-8").split("\n\n")[0]
    assert f"stage {stage_of(path)} of 3" in head and "arXiv 2405.15738" in head


# --- what all recipes have in common


@each(RECIPES)
def test_every_key_is_known_and_what_it_asks_for_works(path):
    data, training, model = parse(path)
    check_arguments(data, training, model)
    assert not (GONE | DEPRECATED | NEWER) & set(values(path))
    assert training.gradient_checkpointing  # by TRL's default, under whichever name transformers has for it
    assert training.report_to == []
    assert training.save_total_limit >= 2  # one of them may be half-written
    assert training.save_strategy == "steps"


@each(RECIPES)
def test_what_the_first_lines_say_is_so(path):
    head = path.read_text("utf-8").split("\n\n")[0]
    assert ("arXiv 2405.15738, table 15" in head) == (path in STAGED)
    found = re.search(r"Global batch (\d+) = (\d+) per device x (\d+) accumulated x (\d+) GPU", head)
    total, per_device, accumulated, devices = map(int, found.groups())
    _, training, _ = parse(path)
    assert training.per_device_train_batch_size == per_device
    assert training.gradient_accumulation_steps == accumulated
    assert total == per_device * accumulated * devices
    assert "768 x 768 pixels (144 visual tokens)" in head
    if path in STAGED:
        for side in RESOLUTIONS[path.parent.name][1:]:
            assert f"--resolution {side} ({(side // 64) ** 2})" in head


@each(RECIPES)
def test_the_memory_in_the_first_lines_is_what_is_counted(path, cost, models):
    head = path.read_text("utf-8").split("\n\n")[0]
    said = float(re.search(r"^# Memory: ([\d.]+) GB .*, counted", head, flags=re.M)[1])
    _, training, model = parse(path)
    small = path.parent.name.startswith("convllava-1.5b")
    if model.use_peft:
        counted = cost.adapter_bytes(cost.QWEN2_5_1_5B if small else None, bits=4 if model.load_in_4bit else 16)
    else:
        trained, frozen = (6, 2) if model.dtype == "bfloat16" else (16, 4)
        counted = cost.state_bytes(model_of(path, models), stage_of(path), trained, frozen) / (1 if small else 8)
    assert said == round(counted / 1e9, 1)


@each(RECIPES)
def test_images_are_never_cut(path):
    _, training, _ = parse(path)
    tokens = (max(RESOLUTIONS[path.parent.name]) // 64) ** 2
    if path in ADAPTERS:  # data of any kind: several images, anywhere in the text
        assert training.max_length is None
    else:  # one image, at the start
        assert training.max_length >= tokens + 1024


# --- the paper's three stages


@each(STAGED)
def test_hyperparameters_are_the_paper_s(path):
    _, training, _ = parse(path)
    paper = PAPER[stage_of(path)]
    assert training.learning_rate == paper["learning_rate"]
    devices = int(re.search(r"x (\d+) GPU", path.read_text("utf-8"))[1])
    assert training.per_device_train_batch_size * training.gradient_accumulation_steps * devices == paper["batch"]
    for key, value in COMMON.items():
        assert getattr(training, key) == value, key
    assert "adamw" in str(training.optim).lower()
    assert training.get_warmup_steps(1000) == 30


@each(STAGED)
def test_what_trains_is_what_the_paper_trains(path, models):
    _, training, _ = parse(path)
    model = model_of(path, models)
    parts = set_trainable(model, training.trainable)
    expected = PAPER[stage_of(path)]["trains"]
    if model.config.tie_word_embeddings:
        expected = expected - {"lm_head"}
    assert {part.name for part in parts if part.trainable} == expected
    assert all(part.trainable in (0, part.total) for part in parts)


@each(STAGED)
def test_a_stage_starts_from_the_one_before(path):
    names = ["assembled", "stage1_projector", "stage2_pretrain", "stage3_instruct"]
    for side in (None, 768, 1024, 1536):
        data, training, model = parse(path, *([] if side is None else ["--resolution", str(side)]))
        folder = f"checkpoints/{path.parent.name}-{side or 768}"
        assert data.resolution == (side or 768)
        assert training.output_dir == f"{folder}/{path.stem}"
        assert model.model_name_or_path == f"{folder}/{names[stage_of(path) - 1]}"


@each(STAGED)
def test_the_resolution_changes_nothing_but_the_folders(path):
    one, other = ({key: value for part in parse(path, "--resolution", side) for key, value in vars(part).items()}
                  for side in ("768", "1536"))  # fmt: skip
    assert {key for key in one if key not in ("bad_samples", "distributed_state") and one[key] != other[key]} == {
        "resolution", "model_name_or_path", "output_dir"
    }  # fmt: skip


@each(STAGED)
def test_data_sets_name_where_their_images_are(path):
    data, _, _ = parse(path)
    readme = (ROOT / "recipes" / "README.md").read_text("utf-8")
    entries = data.datasets or [{"path": data.dataset_name, "image_folder": data.image_folder}]
    for entry in entries:
        assert set(entry) <= set(ENTRY_KEYS)
        assert entry["image_folder"]
        assert f"`{entry['path']}`" in readme
    assert len(entries) == {1: 4, 2: 5, 3: 1}[stage_of(path)]


def test_the_page_s_native_stages_follow_each_other(monkeypatch):
    """Stages 2 and 3 with a preset of as many visual tokens as the squares have."""
    monkeypatch.chdir(ROOT)
    lines = [arguments for line in command_lines() if "--preset" in line and (arguments := trained_by(line))]
    second, third = (make_parser().parse_args_and_config([*arguments, "--use_cpu", "true"]) for arguments in lines)
    for data, training, _ in (second, third):
        assert PRESETS[data.preset] == data.resolution**2
        assert training.group_by_image_shape
    assert second[2].model_name_or_path.endswith("-1536/stage1_projector")
    assert third[2].model_name_or_path == second[1].output_dir != third[1].output_dir


def test_a_data_set_on_the_command_line_replaces_the_recipe_s():
    recipe = ROOT / "recipes" / "convllava-7b" / "stage2_pretrain.yaml"
    arguments = ["--config", str(recipe), "--use_cpu", "true", "--dataset_name", "mine.json", "--image_folder", "."]
    data, _, _ = make_parser().parse_args_and_config(arguments)
    assert (data.dataset_name, data.image_folder, data.datasets) == ("mine.json", ".", None)


# --- adapters


@each(ADAPTERS)
def test_trl_s_own_script_takes_the_recipe(path):
    from trl.scripts import sft

    _, training, model, _ = parse(path, parser=sft.make_parser())
    assert not training.trust_remote_code  # which the command line says, see docs/train.md
    assert training.assistant_only_loss
    assert model.use_peft
    assert model.dtype == "bfloat16"
    quantization = trl.get_quantization_config(model)
    assert (quantization is not None) == (path.stem == "qlora")
    if quantization is not None:
        assert quantization.load_in_4bit
        assert quantization.bnb_4bit_quant_type == "nf4"


@each(ADAPTERS)
@pytest.mark.parametrize("text", ["llama", "qwen2"])
def test_adapters_go_into_the_language_model_alone(path, text):
    _, _, arguments = parse(path)
    assert arguments.lora_target_modules == LORA_TARGETS
    config = make_config(text)
    linear = {name for name, module in make_model(config).named_modules() if type(module).__name__ == "Linear"}
    model = peft.get_peft_model(make_model(config), trl.get_peft_config(arguments))
    adapted = {
        name.removeprefix("base_model.model.")
        for name, module in model.named_modules()
        if isinstance(module, peft.tuners.tuners_utils.BaseTunerLayer)
    }
    assert adapted == {name for name in linear if ".language_model." in name}
    saved = {name.removeprefix("base_model.model.") for name, parameter in model.named_parameters()
             if parameter.requires_grad and "lora_" not in name}  # fmt: skip
    projector = "model.multi_modal_projector.modules_to_save.default."
    assert saved == {f"{projector}linear_{n}.{kind}" for n in (1, 2) for kind in ("weight", "bias")}


# --- accelerate


def accelerate_config(name: str):
    from accelerate.commands.config.config_args import load_config_from_file

    return load_config_from_file(launch_arguments(["--accelerate_config", name]).config_file)


@pytest.mark.parametrize("name", ACCELERATE)
def test_trl_s_accelerate_configs_are_what_the_recipes_need(name):
    """Eight GPUs and bfloat16; whole weights in checkpoints; accumulation and clipping as the recipe has them."""
    config = accelerate_config(name)
    assert (config.distributed_type.value, config.mixed_precision) == (ACCELERATE[name], "bf16")
    assert config.num_processes == 8
    assert config.deepspeed_config.get("zero_stage") == {"zero2": 2, "zero3": 3}.get(name)
    assert not {"gradient_accumulation_steps", "gradient_clipping"} & set(config.deepspeed_config)
    assert config.deepspeed_config.get("zero3_save_16bit_model") == (True if name == "zero3" else None)


def test_the_accelerate_configs_that_are_named_exist():
    texts = [page(), *(path.read_text("utf-8") for path in STAGED)]
    for text in texts:
        named = re.findall(r"--accelerate_config (\w+)(?: or (\w+))?", text)
        assert {name for pair in named for name in pair if name} <= {*ACCELERATE, "NAME"}
    assert all(f"`{name}`" in texts[0] for name in ACCELERATE)


def fsdp_environment() -> dict[str, str]:
    """The environment that `accelerate launch` makes of the file."""
    from accelerate.commands.launch import launch_command_parser
    from accelerate.utils.launch import prepare_multi_gpu_env

    config = accelerate_config("fsdp2")
    arguments = Namespace(**vars(launch_command_parser().parse_args(["script.py"])))
    for key, value in {**vars(config), **config.fsdp_config, "use_fsdp": True, "dynamo_backend": "no"}.items():
        setattr(arguments, key, value)
    return prepare_multi_gpu_env(arguments)


@pytest.mark.parametrize("text, layer", [("llama", "LlamaDecoderLayer"), ("qwen2", "Qwen2DecoderLayer")])
@pytest.mark.parametrize("adapted", [False, True])
def test_fsdp2_wraps_the_layers_of_tower_and_language_model(text, layer, adapted, monkeypatch):
    from accelerate.utils import FullyShardedDataParallelPlugin
    from accelerate.utils.fsdp_utils import fsdp2_prepare_auto_wrap_policy

    for key, value in fsdp_environment().items():
        if key.startswith(("FSDP_", "ACCELERATE_")):
            monkeypatch.setenv(key, value)
    plugin = FullyShardedDataParallelPlugin()
    assert plugin.fsdp_version == 2
    assert plugin.state_dict_type.name == "FULL_STATE_DICT"  # another kind is no checkpoint for from_pretrained
    assert not plugin.activation_checkpointing
    model = make_model(make_config(text))
    if adapted:
        model = peft.get_peft_model(model, peft.LoraConfig(r=2, target_modules=LORA_TARGETS))
    policy = fsdp2_prepare_auto_wrap_policy(plugin, model)
    wrapped = {type(module).__name__ for module in model.modules() if policy(module)}
    assert wrapped == {"ConvNextLayer", layer}


# --- the page, and the figures on it


def readme() -> str:
    return (ROOT / "recipes" / "README.md").read_text("utf-8")


def page() -> str:
    return (ROOT / "docs" / "train.md").read_text("utf-8")


def command_lines() -> list[list[str]]:
    texts = page() + (ROOT / "README.md").read_text("utf-8")
    blocks = re.findall(r"^```bash\n(.*?)^```$", texts, flags=re.M | re.S)
    return [shlex.split(line, comments=True) for text in blocks for line in text.replace("\\\n", " ").splitlines()]


def trained_by(line: list[str]) -> list[str] | None:
    """What a command hands to our script."""
    if line[:2] == ["convllava", "train"] and "--accelerate_config" in line:
        return launch_arguments(line[2:]).training_script_args
    if line[:2] == ["convllava", "train"]:
        return line[2:]
    return None


def test_the_page_s_commands_are_parsed(monkeypatch):
    monkeypatch.chdir(ROOT)
    parsed = {"convllava": 0, "train": 0, "sft": 0}
    for line in filter(None, command_lines()):
        if line[0] == "convllava":
            cli.build_parser().parse_args(line[1:])
            parsed["convllava"] += 1
        if (arguments := trained_by(line)) is not None:
            check_arguments(*make_parser().parse_args_and_config([*arguments, "--use_cpu", "true"]))
            parsed["train"] += 1
        if line[:2] == ["trl", "sft"]:
            from trl.scripts import sft

            sft.make_parser().parse_args_and_config([*line[2:], "--use_cpu", "true"])
            parsed["sft"] += 1
        for word in line:
            assert not word.startswith("recipes/") or Path(word).is_file(), word
    assert min(parsed.values()) > 0, parsed


def test_the_readme_names_every_recipe_s_folder_and_file():
    for path in RECIPES:
        assert path.name in readme() and f"`{path.parent.name}`" in readme(), path


def test_the_page_s_way_of_merging_gives_the_adapted_model(checkpoint, tmp_path):
    import torch
    from transformers import AutoModelForImageTextToText

    model = make_model()
    adapted = peft.get_peft_model(
        model, peft.LoraConfig(target_modules=LORA_TARGETS, modules_to_save=["multi_modal_projector"])
    )
    with torch.no_grad():
        for parameter in adapted.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1 * torch.randn_like(parameter))
    adapted.save_pretrained(tmp_path / "lora")
    blocks = re.findall(r"^```python\n(.*?)^```$", page(), flags=re.M | re.S)
    (block,) = [block for block in blocks if "PeftModel" in block]
    folders = {"sft": checkpoint, "lora": tmp_path / "lora", "merged": tmp_path / "merged"}
    for name, folder in folders.items():
        block = block.replace(f'"checkpoints/convllava-7b-768/{name}"', repr(str(folder)))
    exec(block.replace("bfloat16", "float32"), {})
    merged = AutoModelForImageTextToText.from_pretrained(tmp_path / "merged").eval()
    ids, pixels = torch.tensor([[1, 3, 3, 3, 3, 50, 60]]), torch.randn(1, 3, 128, 128)
    with torch.no_grad():
        expected = adapted.eval()(input_ids=ids, pixel_values=pixels).logits
        torch.testing.assert_close(merged(input_ids=ids, pixel_values=pixels).logits, expected, rtol=1e-4, atol=1e-4)
        assert not torch.allclose(make_model()(input_ids=ids, pixel_values=pixels).logits, expected, atol=1e-2)
    assert (tmp_path / "merged" / "processor_config.json").is_file()


def test_costs_on_the_page_are_those_counted(cost):
    for line in [*cost.cost_table(), *cost.memory_table()]:
        assert line in page().splitlines()


def test_operations_are_counted_as_arithmetic_says(cost, models):
    """Dense layers cost two operations a weight and position, which is all but a few per cent of either part."""
    forward = cost.forward_flops(models["convllava-7b"], 768)
    block = models["convllava-7b"].model.vision_tower.encoder.stages[4]
    assert forward["stage 4"] == pytest.approx(2 * sum(p.numel() for p in block.parameters()) * 144, rel=0.01)
    language_model = models["convllava-7b"].model.language_model.layers
    dense = sum(parameter.numel() for parameter in language_model.parameters())
    dense += models["convllava-7b"].lm_head.weight.numel()
    assert forward["language model"] == pytest.approx(2 * dense * (144 + cost.TEXT_TOKENS), rel=0.03)
