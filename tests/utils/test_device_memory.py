"""Where a device's memory runs out, one line says of what, how much was needed, and what takes less."""

import pytest
import torch
from helpers.tiny_models import make_image
from transformers import AutoModelForImageTextToText

from convllava_hf import cli
from convllava_hf.cli import profile
from convllava_hf.errors import ConvLlavaError
from convllava_hf.inference import load, user_turn
from convllava_hf.utils.device_memory import explain_out_of_memory, is_out_of_memory, needed_and_free


CUDA = (
    "CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total capacity of 79.11 GiB of which 1.25 GiB is "
    "free. "
    "Including non-PyTorch memory, this process has 77.86 GiB memory in use. Of the allocated memory 70.00 GiB is "
    "allocated by PyTorch, and 7.00 GiB is reserved by PyTorch but unallocated. If reserved but unallocated memory is "
    "large try setting PYTORCH_CUDA_ALLOC_CONF=expandable_segments:True to avoid fragmentation."
)
LIMITED = CUDA.replace("1.25 GiB is free. ", "60.00 GiB is free. 8.00 GiB allowed; ")


def full(*args, **kwargs):
    raise torch.OutOfMemoryError(CUDA)


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (torch.OutOfMemoryError(CUDA), "2.00 GiB more were needed, and 1.25 GiB of 79.11 GiB are free"),
        (
            torch.OutOfMemoryError(LIMITED),
            "2.00 GiB more were needed, and 60.00 GiB of 79.11 GiB are free (this process may use 8.00 GiB)",
        ),
        (RuntimeError("CUDA error: out of memory\nSearch for it."), "CUDA error: out of memory"),
        (
            RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
            "CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`",
        ),
    ],
)
def test_what_was_needed_and_is_free(error, expected):
    assert is_out_of_memory(error)
    assert needed_and_free(error) == expected
    with pytest.raises(ConvLlavaError) as caught, explain_out_of_memory("the cake", "cuda:0", "Eat less."):
        raise error
    assert str(caught.value) == f"The memory of cuda:0 does not hold the cake: {expected}. Eat less."


@pytest.mark.parametrize("error", [RuntimeError("shapes differ"), ValueError("out of memory")])
def test_other_errors_stay_what_they_are(error):
    assert not is_out_of_memory(error)
    with pytest.raises(type(error), match=str(error)), explain_out_of_memory("the cake", "cuda:0", ""):
        raise error


def test_loading(checkpoint, monkeypatch):
    monkeypatch.setattr(AutoModelForImageTextToText, "from_pretrained", full)
    monkeypatch.setattr("convllava_hf.inference.assistant.ConvLlavaForConditionalGeneration.from_pretrained", full)
    with pytest.raises(
        ConvLlavaError, match="cpu does not hold the model in .*float32: 2.00 GiB .*--quantization 4bit"
    ):
        load(checkpoint, device="cpu", dtype="float32")


def test_answering(checkpoint, monkeypatch):
    assistant = load(checkpoint, device="cpu", dtype="float32")
    monkeypatch.setattr(assistant.model.vision_tower, "forward", full)
    with pytest.raises(ConvLlavaError, match="this conversation of .* tokens .*: 2.00 GiB more were needed.*--size"):
        assistant.answer([user_turn("What?", [make_image()])])


def test_the_command_line(checkpoint, tmp_path, monkeypatch, capsys):
    make_image().save(tmp_path / "image.png")
    monkeypatch.setattr("convllava_hf.inference.assistant.ConvLlavaForConditionalGeneration.from_pretrained", full)
    assert cli.main(["ask", str(checkpoint), str(tmp_path / "image.png"), "What?", "--device", "cpu"]) == 2
    error = capsys.readouterr().err
    assert error.startswith("convllava: error: The memory of cpu does not hold the model") and error.count("\n") == 1


def test_commands_that_say_nothing_better(checkpoint, monkeypatch, capsys):
    monkeypatch.setattr(profile, "run", full)
    assert cli.main(["profile", str(checkpoint)]) == 2
    error = capsys.readouterr().err
    assert error.startswith("convllava: error: There is not enough memory") and error.count("\n") == 1


@pytest.mark.parametrize("where", ["loading", "step"])
def test_training(where, converted_checkpoint, tmp_path, monkeypatch):
    pytest.importorskip("trl")
    from helpers.training_runs import RECIPES, STAGES, run

    from convllava_hf import train

    if where == "loading":
        monkeypatch.setattr(train, "_load_model", full)
        expected = "does not hold the model '.*stage1.*': 2.00 GiB more were needed.* load_in_4bit"
    else:
        monkeypatch.setattr(train.ConvLlavaTrainer, "training_step", full)
        expected = "does not hold a training step with 8 samples at once: 2.00 GiB .* per_device_train_batch_size"
    recipe = RECIPES / f"{STAGES[2]}.yaml"
    with pytest.raises(ConvLlavaError, match=expected):
        run(recipe, converted_checkpoint("stage1"), tmp_path / "out", max_steps=1, per_device_train_batch_size=8)
