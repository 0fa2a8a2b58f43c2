"""Converting the original's checkpoints, in all the layouts that they come in."""

import errno
import json
import os
import shutil
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from helpers import golden_variants
from helpers.fresh_process import ANSWERS, run_fresh
from safetensors.torch import load_file, save_file

from convllava_hf import ConvLlavaForConditionalGeneration, ConvLlavaProcessor
from convllava_hf.convert import convert_checkpoint
from convllava_hf.convert.keys import CONVNEXT_TABLE, ORIGINAL_TABLE, rename_key
from convllava_hf.convert.writing import ShardWriter
from convllava_hf.errors import ConvLlavaError


EMBEDDINGS = {
    "lm_head.weight": "lm_head.weight",
    "model.language_model.embed_tokens.weight": "model.embed_tokens.weight",
}


@pytest.fixture(scope="module")
def converted(golden, tmp_path_factory) -> Path:
    return convert_checkpoint(
        golden / "checkpoint-stage3", tmp_path_factory.mktemp("converted") / "out", progress=False
    )


@pytest.fixture
def source(golden, tmp_path) -> Path:
    """A copy of the original checkpoint for the test to change."""
    return Path(shutil.copytree(golden / "checkpoint-stage3", tmp_path / "source"))


def weights_of(folder: Path) -> dict[str, torch.Tensor]:
    return {name: tensor for file in sorted(folder.glob("*.safetensors")) for name, tensor in load_file(file).items()}


def assert_same_weights(folder: Path, other: Path):
    found, expected = weights_of(folder), weights_of(other)
    assert found.keys() == expected.keys()
    for name in expected:
        assert torch.equal(found[name], expected[name]), name


# --- the result -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("stage", ["init", "stage1", "stage2", "stage3"])
def test_every_parameter_has_the_originals_norm(golden, tmp_path, stage):
    """Names are mapped by the table, and norms are what the original code had after each stage of training."""
    out = convert_checkpoint(golden / f"checkpoint-{stage}", tmp_path / "out", progress=False)
    model, info = ConvLlavaForConditionalGeneration.from_pretrained(out, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"] and not info["mismatched_keys"]
    if stage == "init":
        return
    norms = json.loads((golden / "training.json").read_text())[stage]["param_norms_after"]
    parameters = dict(model.named_parameters())
    checked = set()
    for there, norm in norms.items():
        if (name := rename_key(there, ORIGINAL_TABLE)) is not None:
            rows = 640 if "embed_tokens" in name or name == "lm_head.weight" else None
            assert parameters[name][:rows].norm().item() == pytest.approx(norm, rel=1e-5), name
            checked.add(name)
    assert checked == set(parameters)


def test_answers_are_the_originals(golden, golden_cases, converted):
    from PIL import Image

    figures = np.load(golden / "inference.npz")
    model = ConvLlavaForConditionalGeneration.from_pretrained(converted).eval()
    processor = ConvLlavaProcessor.from_pretrained(converted)
    for name, case in golden_cases.items():
        images = [Image.open(golden / "images" / file) for file in case["images"]]
        inputs = processor(images=images or None, text=case["prompt"], return_tensors="pt")
        with torch.no_grad():
            logits = model(**inputs).logits[0, :, :640]
        assert np.abs(logits.numpy() - figures[f"{name}.logits"]).max() < 1e-4
        ids = model.generate(**inputs, max_new_tokens=24, do_sample=False)[0, inputs["input_ids"].shape[1] :]
        assert ids.tolist() == case["generated"]
        assert processor.decode(ids, skip_special_tokens=True) == case["text"]


def test_what_the_folder_holds(converted):
    files = {path.name for path in converted.iterdir()}
    assert files >= {
        *("config.json", "generation_config.json", "model.safetensors", "chat_template.jinja"),
        *("processor_config.json", "preprocessor_config.json", "tokenizer.json", "tokenizer_config.json"),
        *("configuration_convllava.py", "modeling_convllava.py", "processing_convllava.py"),
        *("image_processing_convllava.py", "image_utils_convllava.py"),
    }
    config = json.loads((converted / "config.json").read_text())
    assert set(config["auto_map"]) >= {
        *("AutoConfig", "AutoModel", "AutoModelForVision2Seq", "AutoModelForImageTextToText"),
        "AutoModelForMultimodalLM",
    }
    assert config["dtype"] == "float32" and config["image_token_id"] == 640
    assert config["vision_config"]["image_size"] == 320 and config["text_config"]["vocab_size"] == 704
    assert not any(key.startswith("mm_") for key in config["text_config"])
    processor = ConvLlavaProcessor.from_pretrained(converted)
    assert processor.image_processor.size == {"height": 320, "width": 320} and processor.image_suffix == " "
    assert processor.tokenizer.padding_side == "left" and processor.tokenizer.model_max_length == 2048
    assert not [path for path in converted.parent.iterdir() if path != converted]  # no temporary folder is left


def test_new_rows_are_the_mean_and_are_never_generated(golden, converted, golden_cases):
    weights = weights_of(converted)
    original = load_file(golden / "checkpoint-stage3" / "model.safetensors")
    for name, there in EMBEDDINGS.items():
        torch.testing.assert_close(weights[name][640:], original[there].mean(0).expand(64, -1))
    model = ConvLlavaForConditionalGeneration.from_pretrained(converted).eval()
    processor = ConvLlavaProcessor.from_pretrained(converted)
    inputs = processor(text=golden_cases["text-only"]["prompt"], return_tensors="pt")
    with torch.no_grad():
        hidden = model(**inputs, output_hidden_states=True).hidden_states[-1][0, -1]
        model.lm_head.weight[640:] = hidden * 100
        assert model(**inputs).logits[0, -1].argmax() >= 640
    for arguments in ({"do_sample": False}, {"do_sample": True, "top_k": 0}, {"num_beams": 2, "do_sample": False}):
        new = model.generate(**inputs, max_new_tokens=8, **arguments)[0, inputs["input_ids"].shape[1] :]
        assert (new < 640).all()


@pytest.mark.slow
def test_loads_in_a_fresh_process_without_the_package(converted, golden, golden_cases):
    import transformers

    name = "AutoModelForImageTextToText"
    if int(transformers.__version__.split(".")[0]) < 5:
        name = "AutoModelForVision2Seq"
    case = golden_cases["one-image"]
    told = run_fresh(
        ANSWERS + f"result = answers(values['folder'], ['{name}', 'AutoModel'], trust_remote_code=True)",
        folder=converted,
        image=golden / "images" / case["images"][0],
        question=case["turns"][0][1].removeprefix("<image>\n"),
    )
    assert told[name]["ids"] == case["generated"][:16]
    assert told["processor"].startswith("transformers_modules.")


# --- the layouts that checkpoints come in ---------------------------------------------------------------------------


LAYOUTS = [
    golden_variants.as_sharded_bin,
    golden_variants.as_sharded_safetensors,
    golden_variants.as_old_pickle,
    golden_variants.with_pooling_norm_and_prefix,
    golden_variants.tower_as_safetensors,
    golden_variants.tower_in_the_main_shards,
    golden_variants.another_tower_in_the_main_shards,
    golden_variants.tower_named_relatively,
    golden_variants.tower_named_absolutely,
    golden_variants.with_odd_settings,
    golden_variants.with_tokenizer_files_of_4_33,
    golden_variants.with_timm_names_in_the_shards,
]


@pytest.mark.parametrize("change", LAYOUTS)
def test_layouts(source, converted, tmp_path, change):
    change(source)
    out = convert_checkpoint(source, tmp_path / "out", progress=False)
    assert_same_weights(out, converted)


def test_four_stages(source, tmp_path):
    tower = source / "vision_tower"
    weights = torch.load(tower / "pytorch_model.bin", weights_only=True)
    torch.save(
        {name: tensor for name, tensor in weights.items() if "stages.4" not in name}, tower / "pytorch_model.bin"
    )
    golden_variants.edit_json(tower / "config.json", depths=[1, 1, 2, 1], hidden_sizes=[8, 16, 24, 32], num_stages=4)
    golden_variants.edit_json(tower / "config.json", out_features=["stage4"], out_indices=[4])
    language = load_file(source / "model.safetensors")
    language["model.mm_projector.0.weight"] = language["model.mm_projector.0.weight"][:, :32].contiguous()
    save_file(language, source / "model.safetensors")
    out = convert_checkpoint(source, tmp_path / "out", progress=False)
    model, info = ConvLlavaForConditionalGeneration.from_pretrained(out, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"] and not info["mismatched_keys"]
    assert model.config.stride == 32 and ConvLlavaProcessor.from_pretrained(out).image_processor.stride == 32


def test_shards_and_dtype(source, converted, tmp_path):
    out = convert_checkpoint(source, tmp_path / "out", dtype="bfloat16", max_shard_size="100KB", progress=False)
    files = sorted(out.glob("*.safetensors"))
    assert len(files) > 3 and all(path.stat().st_size < 120_000 for path in files)
    model, info = ConvLlavaForConditionalGeneration.from_pretrained(out, dtype="auto", output_loading_info=True)
    assert model.dtype == torch.bfloat16 and not info["missing_keys"] and not info["unexpected_keys"]
    for name, tensor in weights_of(converted).items():
        assert torch.equal(weights_of(out)[name], tensor.bfloat16()), name


def test_half_precision_is_kept(source, tmp_path):
    save_file({k: v.half() for k, v in load_file(source / "model.safetensors").items()}, source / "model.safetensors")
    golden_variants.edit_json(source / "config.json", torch_dtype="float16")
    out = convert_checkpoint(source, tmp_path / "out", progress=False)
    assert {tensor.dtype for tensor in weights_of(out).values()} == {torch.float16}
    assert json.loads((out / "config.json").read_text())["dtype"] == "float16"


def test_legacy_tokenizer_needs_no_blanks(source, tmp_path):
    golden_variants.edit_json(source / "tokenizer_config.json", legacy=True)
    processor = ConvLlavaProcessor.from_pretrained(convert_checkpoint(source, tmp_path / "out", progress=False))
    assert processor.image_suffix == "" and processor.chat_template.startswith('{%- set after_bos = "" -%}')
    text = processor.apply_chat_template([{"role": "user", "content": "Hello"}], add_generation_prompt=True)
    assert processor.tokenizer(text, add_special_tokens=False).input_ids[:2] == [1, 290]  # <s> ▁A


# --- what is refused ------------------------------------------------------------------------------------------------


UNSAFE_FILES = [
    "../golden.bin",
    "/etc/shadow.bin",
    "/dev/zero",
    "..",
    "",
    "a/../../b.bin",
    "..\\b.bin",
    "C:b.bin",
    ".hidden.bin",
    "b.bin\n",
    "config.json",
    5,
    None,
]


def make_fifo(path: Path):
    path.unlink()
    os.mkfifo(path)


REFUSALS = [
    (
        golden_variants.drop_weight,
        r"2 weights missing: model\.multi_modal_projector\.linear_2\.bias, model\.language_model\.norm\.weight",
    ),
    (golden_variants.add_weight, r"2 weights left over.*extra.*model\.image_newline"),
    (golden_variants.misshape, r"model\.norm\.weight .* is \(63,\), expected \(64,\)"),
    (golden_variants.lose_shard, "1 are missing .*pytorch_model-00002-of-00002.bin"),
    *((golden_variants.name_in_the_index(file), "names the file .*next to it") for file in UNSAFE_FILES),
    (lambda s: make_fifo(s / "config.json"), "is a FIFO, and a file is expected"),
    (golden_variants.evil_pickle, "cannot be read as PyTorch weights"),
    (golden_variants.swap_tower, "'clip_vision_model', but ConvLLaVA's vision tower is a ConvNeXt"),
    (lambda s: (s / "model.safetensors").unlink(), "holds no weights"),
    (lambda s: (s / "model.safetensors").write_bytes(b"no weights"), "cannot be read as safetensors"),
    (lambda s: (s / "config.json").unlink(), "config.json is missing"),
    (lambda s: (s / "config.json").write_text("{"), "is not valid JSON"),
    (lambda s: (s / "tokenizer.model").unlink(), "no tokenizer.model"),
    (lambda s: (s / "vision_tower" / "pytorch_model.bin").unlink(), "No weights of the vision tower"),
    (lambda s: shutil.rmtree(s / "vision_tower"), "example/convnext-tiny-320.*--vision-tower"),
    (lambda s: golden_variants.edit_json(s / "config.json", model_type="llama"), "no checkpoint of the original"),
    (lambda s: golden_variants.edit_json(s / "config.json", model_type="convllava"), "nothing to convert"),
    (lambda s: golden_variants.edit_json(s / "config.json", mm_projector_type="linear"), "mm_projector_type='linear'"),
    (lambda s: golden_variants.edit_json(s / "config.json", mm_vision_select_layer=-2), "mm_vision_select_layer=-2"),
    (
        lambda s: golden_variants.edit_json(s / "config.json", mm_vision_resolution=800),
        "nearest such size is 768 x 768",
    ),
    (
        lambda s: golden_variants.edit_json(s / "config.json", num_hidden_layers=10**12),
        "1000000000007 layers, and there are",
    ),
    (lambda s: golden_variants.edit_json(s / "config.json", num_attention_heads=0), "describe no model"),
    (lambda s: golden_variants.edit_json(s / "config.json", hidden_size="64 "), "describe no model"),
    (lambda s: golden_variants.edit_json(s / "config.json", mm_vision_resolution="768"), "mm_vision_resolution '768'"),
    (lambda s: golden_variants.edit_json(s / "config.json", architectures=5), "names the architecture 5"),
    (lambda s: golden_variants.edit_json(s / "vision_tower" / "config.json", depths=7), "describe no model"),
    (
        lambda s: golden_variants.edit_json(s / "vision_tower" / "preprocessor_config.json", crop_size="320"),
        "a square",
    ),
    (lambda s: golden_variants.edit_json(s / "generation_config.json", suppress_tokens=5), "describe no model"),
    (lambda s: golden_variants.edit_json(s / "config.json", pad_token_id=10**12), "describe no model"),
    (
        lambda s: golden_variants.edit_json(s / "config.json", architectures=["LlavaNoneForCausalLM"]),
        "LlavaNoneForCausalLM",
    ),
]


@pytest.mark.parametrize(("change", "message"), REFUSALS)
def test_refusals(source, tmp_path, change, message):
    change(source)
    with pytest.raises(ConvLlavaError, match=f"(?s){message}"):
        convert_checkpoint(source, tmp_path / "out", progress=False)
    assert [path.name for path in tmp_path.iterdir()] == ["source"]


def test_wrong_arguments(source, tmp_path):
    for arguments, message in (
        ({"source": tmp_path / "nowhere"}, "there is no folder"),
        ({"source": source / "config.json"}, "is a file"),
        ({"vision_tower": tmp_path / "nowhere"}, "there is no folder"),
        ({"dtype": "int8"}, "expected float32, float16 or bfloat16"),
        ({"max_shard_size": "two"}, "max_shard_size is 'two'"),
    ):
        with pytest.raises(ConvLlavaError, match=message):
            convert_checkpoint(**{"source": source, "output": tmp_path / "out", "progress": False, **arguments})


def test_existing_output(source, converted, tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    (out / "letter.txt").write_text("keep me")
    for overwrite in (False, True):
        with pytest.raises(ConvLlavaError, match="--overwrite"):
            convert_checkpoint(source, out, overwrite=overwrite, progress=False)
    assert (out / "letter.txt").read_text() == "keep me"
    with pytest.raises(ConvLlavaError, match="contains what is being read"):
        convert_checkpoint(source, source, overwrite=True, progress=False)
    shutil.rmtree(out)
    shutil.copytree(converted, out)
    (out / "stale.txt").write_text("")
    assert convert_checkpoint(source, out, overwrite=True, progress=False) == out
    assert_same_weights(out, converted)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "source"]
    assert not (out / "stale.txt").exists()


@pytest.mark.parametrize("existing", [False, True])
@pytest.mark.parametrize("exception", [KeyboardInterrupt, OSError])
def test_interrupted(source, converted, tmp_path, monkeypatch, existing, exception):
    out = tmp_path / "out"
    if existing:
        shutil.copytree(converted, out)
    write = ShardWriter.write

    def interrupted(self, name, tensor):
        if name == "lm_head.weight":
            raise exception
        write(self, name, tensor)

    monkeypatch.setattr(ShardWriter, "write", interrupted)
    with pytest.raises(exception):
        convert_checkpoint(source, out, overwrite=True, progress=False)
    assert sorted(path.name for path in tmp_path.iterdir()) == (["out", "source"] if existing else ["source"])
    if existing:
        assert_same_weights(out, converted)


# --- parts ----------------------------------------------------------------------------------------------------------


def test_names_without_a_pattern_are_unknown():
    assert rename_key("layernorm.bias", CONVNEXT_TABLE) is None
    for name in ("xembeddings.a", "model.layernorm.weight", "encoder"):
        with pytest.raises(KeyError):
            rename_key(name, CONVNEXT_TABLE)


def test_shard_writer_writes_what_safetensors_reads(tmp_path):
    tensors = {
        "a": torch.randn(3, 5),
        "b": torch.randn(7).bfloat16(),
        "scalar": torch.tensor(4.0).half(),
        "none": torch.zeros(0, 3),
        "c.weight": torch.randn(6, 4).t(),
        "ids": torch.arange(5),
    }
    announced = {name: (tuple(tensor.shape), tensor.dtype) for name, tensor in tensors.items()}
    writer = ShardWriter(tmp_path, announced, max_shard_size=100)
    for name, tensor in tensors.items():
        writer.write(name, tensor)
    writer.finish()
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == sum(tensor.nbytes for tensor in tensors.values())
    for name, tensor in tensors.items():
        assert torch.equal(load_file(tmp_path / index["weight_map"][name])[name], tensor)
    writer = ShardWriter(tmp_path, announced, max_shard_size=100)
    with pytest.raises(ValueError, match="next tensor to write is a"):
        writer.write("b", tensors["b"])


# --- two at once, and what the dead leave ----------------------------------------------------------------------------


def test_two_conversions_into_one_folder(source, tmp_path, monkeypatch):
    """The second is refused before it reads anything, and the first is not disturbed."""
    out = tmp_path / "out"
    write, refusals = ShardWriter.write, []

    def meanwhile(self, name, tensor):
        if not refusals:
            with pytest.raises(ConvLlavaError, match="out is being written by another process") as caught:
                convert_checkpoint(source, out, progress=False)
            refusals.append(caught.value)
        write(self, name, tensor)

    monkeypatch.setattr(ShardWriter, "write", meanwhile)
    convert_checkpoint(source, out, progress=False)
    assert len(refusals) == 1
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "source"]


def test_what_a_killed_conversion_left_is_put_back_and_cleared(source, converted, tmp_path):
    out, old = tmp_path / "out", tmp_path / ".out.0123abcd.old"
    shutil.copytree(converted, old)  # killed between the two renames
    (tmp_path / ".out.0123abcd.partial").mkdir()
    (tmp_path / ".out.lock").touch()
    with pytest.raises(ConvLlavaError, match="exists already"):
        convert_checkpoint(source, out, progress=False)
    assert_same_weights(out, converted)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "source"]


def test_a_full_disk_names_the_file_that_was_being_written(source, tmp_path, monkeypatch):
    def fail(*args):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("convllava_hf.convert.writing.struct", SimpleNamespace(pack=fail))
    with pytest.raises(OSError, match=r"No space left on device: .*model\.safetensors"):
        convert_checkpoint(source, tmp_path / "out", progress=False)
