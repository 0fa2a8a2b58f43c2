"""Checkpoints carry the code that loads them, complete and self-contained, whichever way they were saved."""

import ast
import json
import os
import sys
from pathlib import Path

import pytest
import torch
import transformers
from helpers.fresh_process import ANSWERS, run_fresh
from helpers.tiny_models import TEXT_SHAPE, ask, make_config, make_image, make_model, make_tokenizer
from transformers import AutoModel, AutoModelForImageTextToText, AutoProcessor, AutoTokenizer
from transformers.dynamic_module_utils import check_imports, get_class_from_dynamic_module, get_imports

import convllava_hf
from convllava_hf import ConvLlavaConfig, ConvLlavaImageProcessor, ConvLlavaProcessor
from convllava_hf.modeling.modeling_convllava import AUTO_MAP


MODELING = Path(convllava_hf.__file__).parents[2] / "modeling"
CODE = sorted(path.name for path in MODELING.glob("*_convllava.py"))
QUESTION = "What is on the sign?"
# What there is to load a model that generates with, on this transformers.
GENERATING = [
    name
    for name in ("AutoModelForVision2Seq", "AutoModelForImageTextToText", "AutoModelForMultimodalLM")
    if hasattr(transformers, name)
]


@pytest.fixture(scope="module")
def image(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("image") / "image.png"
    make_image(seed=3).save(path)
    return path


@pytest.fixture(scope="module")
def expected(model, processor, image) -> dict:
    """Of the model in this process: prompt, greedy answer, and the base model's hidden states in short."""
    inputs = processor.apply_chat_template(
        ask(QUESTION, str(image)), add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt"
    )
    with torch.no_grad():
        hidden = model.model(**inputs).last_hidden_state[0].abs().sum(-1)
    prompt, ids = _answer(model, processor, image)
    return {"input_ids": prompt, "ids": ids, "hidden": hidden.tolist()}


@pytest.fixture(scope="module")
def base_only(tmp_path_factory, checkpoint, processor) -> Path:
    """What AutoModel alone saves: no head, and only one class's own entry of `auto_map` if it were left to it."""
    folder = tmp_path_factory.mktemp("base-only")
    AutoModel.from_pretrained(checkpoint).save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def fresh(tmp_path_factory, checkpoint, base_only, image) -> dict:
    """What a new process without the package finds in each of the folders, and in one that it saves itself."""
    resaved = tmp_path_factory.mktemp("resaved")
    return run_fresh(
        ANSWERS
        + """
from transformers.models.auto.image_processing_auto import AutoImageProcessor

trust = {"trust_remote_code": True}
result = {
    "checkpoint": answers(values["checkpoint"], values["names"], **trust),
    "base only": answers(values["base_only"], ["AutoModel"], **trust),
    "alone": type(AutoImageProcessor.from_pretrained(values["checkpoint"], **trust)).__module__,
}
model = transformers.AutoModelForImageTextToText.from_pretrained(values["checkpoint"], **trust)
model.save_pretrained(values["resaved"])
transformers.AutoProcessor.from_pretrained(values["checkpoint"], **trust).save_pretrained(values["resaved"])
result["resaved"] = answers(values["resaved"], values["names"], **trust)
result["resaved files"] = sorted(path.name for path in Path(values["resaved"]).iterdir())
result["resaved config"] = json.loads((Path(values["resaved"]) / "config.json").read_text())
result["package"] = "convllava_hf" in sys.modules
""",
        checkpoint=checkpoint,
        base_only=base_only,
        resaved=resaved,
        image=image,
        question=QUESTION,
        names=[*GENERATING, "AutoModel"],
    )


@pytest.mark.parametrize("name", [*GENERATING, "AutoModel"])
@pytest.mark.parametrize("folder", ["checkpoint", "resaved"])
def test_a_process_without_the_package_answers_the_same(fresh, expected, folder, name):
    found = fresh[folder]
    assert not fresh["package"]
    assert found["input_ids"] == expected["input_ids"]
    assert found[name]["module"].startswith("transformers_modules.")
    if name == "AutoModel":
        assert found[name]["class"] == "ConvLlavaModel"
        assert found[name]["ids"] == pytest.approx(expected["hidden"], rel=1e-4)
    else:
        assert found[name]["class"] == "ConvLlavaForConditionalGeneration"
        assert found[name]["ids"] == expected["ids"]


def test_the_processors_of_such_a_process_are_the_checkpoints_own(fresh):
    assert fresh["checkpoint"]["processor"].endswith(".processing_convllava")
    assert fresh["checkpoint"]["image_processor"].endswith(".image_processing_convllava")
    assert fresh["alone"].endswith(".image_processing_convllava")


def test_a_base_model_saved_alone_loads_without_the_package(fresh, expected):
    found = fresh["base only"]["AutoModel"]
    assert found["class"] == "ConvLlavaModel"
    assert found["ids"] == pytest.approx(expected["hidden"], rel=1e-4)


def test_a_checkpoint_saved_from_remote_code_is_complete(fresh, checkpoint):
    assert fresh["resaved config"]["auto_map"] == AUTO_MAP
    assert fresh["resaved files"] == sorted(path.name for path in checkpoint.iterdir())


def test_with_the_package_imported_nothing_needs_to_be_trusted(checkpoint, expected, image):
    processor = AutoProcessor.from_pretrained(checkpoint)
    for name in GENERATING:
        model = getattr(transformers, name).from_pretrained(checkpoint)
        assert type(model) is convllava_hf.ConvLlavaForConditionalGeneration
        assert _answer(model, processor, image) == (expected["input_ids"], expected["ids"])
    assert type(processor) is convllava_hf.ConvLlavaProcessor
    assert type(AutoModel.from_pretrained(checkpoint)) is convllava_hf.ConvLlavaModel
    assert convllava_hf.AutoModelForVision2Seq is getattr(transformers, GENERATING[0])


@pytest.mark.parametrize("folder", ["checkpoint", "base_only"])
def test_the_saved_files_hold_every_entry_and_the_code(folder, request):
    folder = request.getfixturevalue(folder)
    config = json.loads((folder / "config.json").read_text())
    assert {"AutoConfig", "AutoModel", "AutoModelForVision2Seq", "AutoModelForImageTextToText"} < set(AUTO_MAP)
    assert config["auto_map"] == AUTO_MAP
    assert config["model_type"] == "convllava"
    processor = json.loads((folder / "processor_config.json").read_text())
    assert processor["auto_map"]["AutoProcessor"] == "processing_convllava.ConvLlavaProcessor"
    images = json.loads((folder / "preprocessor_config.json").read_text())
    assert images["auto_map"]["AutoImageProcessor"] == "image_processing_convllava.ConvLlavaImageProcessor"
    assert json.loads((folder / "tokenizer_config.json").read_text())["padding_side"] == "left"
    assert (folder / "chat_template.jinja").is_file()
    for name in CODE:
        assert (folder / name).read_text() == (MODELING / name).read_text()


def test_the_padding_side_is_saved_for_those_who_load_the_tokenizer_alone(tmp_path):
    """transformers saves it only if the tokenizer was made with it."""
    for side in ("right", None):
        tokenizer = make_tokenizer()
        tokenizer.padding_side = "right"
        if side is None:
            del tokenizer.init_kwargs["padding_side"]
        ConvLlavaProcessor(ConvLlavaImageProcessor(), tokenizer).save_pretrained(tmp_path)
        assert AutoTokenizer.from_pretrained(tmp_path).padding_side == "left"


def test_every_entry_of_auto_map_resolves(checkpoint):
    """SGLang loads them all, and one that fails makes the whole resolution fail."""
    entries = {}
    for name in ("config.json", "processor_config.json", "preprocessor_config.json", "tokenizer_config.json"):
        entries |= json.loads((checkpoint / name).read_text()).get("auto_map", {})
    assert len(entries) >= 7
    for auto_class, reference in entries.items():
        found = get_class_from_dynamic_module(reference, str(checkpoint))
        assert found.__name__ == reference.rpartition(".")[2], auto_class


@pytest.mark.parametrize("name", CODE)
def test_the_code_that_travels_requires_only_what_every_user_has(name):
    path = MODELING / name
    assert set(get_imports(path)) <= {"torch", "transformers", "numpy", "PIL"} | set(sys.stdlib_module_names)
    check_imports(path)


@pytest.mark.parametrize("name", CODE)
def test_the_code_that_travels_imports_its_neighbors_in_the_one_way_that_is_shipped(name):
    """transformers finds the files to ship by `from .module import Name`; another way would be left behind."""
    tree = ast.parse((MODELING / name).read_text())
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            assert not any(alias.name.startswith("convllava") for alias in node.names)
        if isinstance(node, ast.ImportFrom):
            assert not (node.module or "").startswith("convllava_hf")
            if node.level:
                assert node.level == 1
                assert node.module and f"{node.module}.py" in CODE
                assert node in tree.body, "an import inside a function is found too, but hides what a file needs"
    assert not any(
        isinstance(node, ast.Call) and getattr(node.func, "id", "") in ("__import__", "import_module")
        for node in ast.walk(tree)
    )


@pytest.mark.parametrize("auto_class", ["AutoConfig", "AutoModel", "AutoImageProcessor", "AutoProcessor"])
def test_dill_finds_the_classes_where_they_are(checkpoint, auto_class):
    """Other processes get names. What dill does not find it takes apart, and typed arguments do not survive it."""
    dill = pytest.importorskip("dill")
    reference = {
        **AUTO_MAP,
        "AutoImageProcessor": "image_processing_convllava.ConvLlavaImageProcessor",
        "AutoProcessor": "processing_convllava.ConvLlavaProcessor",
    }[auto_class]
    found = get_class_from_dynamic_module(reference, str(checkpoint))
    assert found.__module__.startswith("transformers_modules.")
    assert dill.loads(dill.dumps(found)) is found
    if "Processor" in auto_class:
        one = found.from_pretrained(checkpoint)
        assert type(dill.loads(dill.dumps(one))) is found


@pytest.mark.slow
def test_a_process_without_the_package_maps_data_sets_in_several_processes(checkpoint):
    pytest.importorskip("datasets")
    found = run_fresh(
        """
import numpy as np
from datasets import Dataset

def count(row, processor):
    image = np.zeros((60, 40, 3), np.uint8)
    return {"length": len(processor(images=image, text="<image>" + "a" * row["n"])["input_ids"][0])}

processor = transformers.AutoProcessor.from_pretrained(values["checkpoint"], trust_remote_code=True)
data = Dataset.from_dict({"n": [0, 1, 2, 3]})
mapped = [data.map(count, fn_kwargs={"processor": processor}, num_proc=processes, load_from_cache_file=False)
          for processes in (None, 2, 2)]
result = {
    "lengths": [one["length"][:] for one in mapped],
    "fingerprints": [one._fingerprint for one in mapped],
    "module": type(processor).__module__,
}
""",
        checkpoint=checkpoint,
    )
    assert found["module"].startswith("transformers_modules.")
    assert found["lengths"] == [[4, 5, 6, 7]] * 3
    assert found["fingerprints"][1] == found["fingerprints"][2]


@pytest.fixture
def sharded_model():
    """A model whose class torch's FSDP2 has swapped for one of its own making, on a mesh of one CPU process."""
    dist = pytest.importorskip("torch.distributed")
    if not dist.is_available():
        pytest.skip("this torch has no distributed package")
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        yield fully_shard(make_model(), mesh=init_device_mesh("cpu", (1,)))
    finally:
        dist.destroy_process_group()


def test_a_model_sharded_by_fsdp2_saves_our_code(sharded_model, processor, checkpoint, expected, image, tmp_path):
    from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict

    swapped = type(sharded_model)
    assert swapped is not convllava_hf.ConvLlavaForConditionalGeneration
    state_dict = get_model_state_dict(sharded_model, options=StateDictOptions(full_state_dict=True))
    sharded_model.save_pretrained(tmp_path, state_dict=state_dict)
    processor.save_pretrained(tmp_path)

    assert type(sharded_model) is swapped
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(path.name for path in checkpoint.iterdir())
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["architectures"] == ["ConvLlavaForConditionalGeneration"]
    shipped = get_class_from_dynamic_module(config["auto_map"]["AutoModelForImageTextToText"], str(tmp_path))
    assert shipped.__module__.startswith("transformers_modules.")
    assert _answer(shipped.from_pretrained(tmp_path), processor, image) == (expected["input_ids"], expected["ids"])


ROPE_OF_4 = {"rope_theta": 300.0, "rope_scaling": {"rope_type": "linear", "factor": 1.5}}
ROPE_OF_5 = {"rope_parameters": {"rope_theta": 300.0, "rope_type": "linear", "factor": 1.5}}


@pytest.mark.parametrize("rope", [ROPE_OF_4, ROPE_OF_5], ids=["4", "5"])
def test_positions_are_read_as_either_major_writes_them(rope):
    """transformers 4 would silently take no notice of what 5 writes."""
    config = make_config()
    config = ConvLlavaConfig(config.vision_config, {**TEXT_SHAPE, **rope}, image_token_id=3)
    size = TEXT_SHAPE["hidden_size"] // TEXT_SHAPE["num_attention_heads"]
    expected = 300.0 ** (-torch.arange(0, size, 2) / size) / 1.5
    torch.testing.assert_close(make_model(config).language_model.rotary_emb.inv_freq, expected)


@pytest.mark.skipif(not transformers.__version__.startswith("4."), reason="transformers 5 can be told")
def test_positions_that_transformers_4_cannot_be_told_of_are_refused():
    rope = {"sliding_attention": ROPE_OF_5["rope_parameters"], "full_attention": ROPE_OF_5["rope_parameters"]}
    with pytest.raises(ValueError, match="sliding_attention, full_attention.*install transformers 5"):
        ConvLlavaConfig(text_config={**TEXT_SHAPE, "model_type": "gemma3_text", "rope_parameters": rope})


@pytest.fixture(params=["llama", "qwen2", "converted"])
def crossing(request, processor, converted_checkpoint):
    """Model and processor that are to cross; the positions' base of two differs from the default and is scaled."""
    if request.param == "converted":
        folder = converted_checkpoint("stage3")
        return AutoModelForImageTextToText.from_pretrained(folder), AutoProcessor.from_pretrained(folder)
    vision = make_config().vision_config
    config = ConvLlavaConfig(vision, {**TEXT_SHAPE, "model_type": request.param, **ROPE_OF_5}, image_token_id=3)
    return make_model(config), processor


@pytest.mark.slow
@pytest.mark.skipif("CONVLLAVA_OTHER_PYTHON" not in os.environ, reason="CONVLLAVA_OTHER_PYTHON names no other python")
def test_checkpoints_cross_between_versions_of_transformers(crossing, image, tmp_path):
    """Saved here and loaded there, saved again there and loaded here: the same ids and answers."""
    here, there = tmp_path / "here", tmp_path / "there"
    for part in crossing:
        part.save_pretrained(here)
    prompt, expected = _answer(*crossing, image)

    found = run_fresh(
        ANSWERS
        + """
name, trust = "AutoModelForImageTextToText", {"trust_remote_code": True}
told = answers(values["here"], [name], **trust)
result = {**told[name], "input_ids": told["input_ids"], "version": transformers.__version__}
getattr(transformers, name).from_pretrained(values["here"], **trust).save_pretrained(values["there"])
transformers.AutoProcessor.from_pretrained(values["here"], **trust).save_pretrained(values["there"])
""",
        python=os.environ["CONVLLAVA_OTHER_PYTHON"],
        here=here,
        there=there,
        image=image,
        question=QUESTION,
    )
    assert found["version"] != transformers.__version__
    assert found["input_ids"] == prompt
    assert found["ids"] == expected

    back = AutoModelForImageTextToText.from_pretrained(there), AutoProcessor.from_pretrained(there)
    assert _answer(*back, image) == (prompt, expected)


def _answer(model, processor, image) -> tuple[list, list]:
    """The prompt's ids and those of the greedy answer."""
    inputs = processor.apply_chat_template(
        ask(QUESTION, str(image)), add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt"
    )
    ids = model.generate(**inputs, max_new_tokens=16, do_sample=False)
    return inputs["input_ids"].tolist(), ids[0, inputs["input_ids"].shape[1] :].tolist()
