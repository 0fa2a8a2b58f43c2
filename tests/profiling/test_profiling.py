"""`convllava profile`: its counts against formulas, its figures against one another, its command line."""

import json

import PIL
import pytest
import torch
from torch import nn

from convllava_hf import cli
from convllava_hf.modeling.modeling_convllava import ConvLlavaVisionTower
from convllava_hf.profiling import machine
from convllava_hf.profiling.generation import answer, prompt
from convllava_hf.profiling.measuring import interleaved, operations, peak, reset_peak, resident
from convllava_hf.profiling.models import PAPER_TOWER, built, random_model, tower_config
from convllava_hf.profiling.preprocessing import jpeg, open_jpeg


CPU = torch.device("cpu")


def operations_by_formula(depths, widths, height: int, width: int) -> int:
    """Of a ConvNeXt: two for each multiply-add of stem, downsampling, depthwise convolutions and the two products."""
    positions = height * width // 16
    total = 2 * positions * 48 * widths[0]
    for stage, (depth, channels) in enumerate(zip(depths, widths, strict=True)):
        if stage:
            positions //= 4
            total += 2 * positions * 4 * widths[stage - 1] * channels
        total += depth * 2 * positions * (49 * channels + 8 * channels**2)
    return total


@pytest.mark.parametrize("size", [(768, 768), (1536, 1088)])
def test_operations_of_the_papers_tower(size):
    counted = operations(lambda: ConvLlavaVisionTower(tower_config()), (1, 3, *size))
    assert counted == operations_by_formula(PAPER_TOWER["depths"], PAPER_TOWER["hidden_sizes"], *size)


def test_random_models_are_of_the_true_shape_and_alive():
    tower = built(lambda: ConvLlavaVisionTower(tower_config(tiny=True)), CPU, torch.float32)
    with torch.no_grad():
        one, other = (tower(torch.randn(1, 3, 128, 128)).last_hidden_state for _ in range(2))
    assert one.isfinite().all() and one.std() > 0.01
    assert (one - other).abs().max() > 0.01
    with torch.device("meta"):
        weights = sum(one.numel() for one in ConvLlavaVisionTower(tower_config()).parameters())
    assert weights == pytest.approx(669e6, rel=0.005)  # as measured of the original


def test_an_answer_has_as_many_tokens_as_asked():
    model = random_model("tiny", CPU, torch.float32)
    lengths = []
    model.model.language_model.register_forward_hook(
        lambda module, args, kwargs, output: lengths.append(kwargs["inputs_embeds"].shape[1]), with_kwargs=True
    )
    inputs = prompt(model.config, 6, torch.randn(1, 3, 128, 192))
    answer(model, inputs, 5)
    assert lengths == [inputs["input_ids"].shape[1], 1, 1, 1, 1]


def test_calls_take_turns():
    order = []
    seconds = interleaved({"a": lambda: order.append("a"), "b": lambda: order.append("b")}, CPU, 2)
    assert "".join(order) == "ab" + "abab"
    assert {name: len(taken) for name, taken in seconds.items()} == {"a": 2, "b": 2}


@pytest.mark.skipif(resident(CPU) is None, reason="this system does not tell a process's memory")
def test_peak_of_memory():
    before = resident(CPU)
    reset_peak(CPU)
    torch.ones(64 * 2**20, dtype=torch.uint8)  # freed at once
    assert 60 * 2**20 < peak(CPU) - before < 90 * 2**20
    reset_peak(CPU)
    assert peak(CPU) - before < 40 * 2**20


def test_images_to_prepare_are_jpegs_of_the_size_asked():
    assert open_jpeg(jpeg(160, 120)).size == (160, 120)
    assert jpeg(160, 120) == jpeg(160, 120) != jpeg(160, 120, seed=1)


@pytest.fixture
def small_limits(monkeypatch):
    """Of the machine: what they are does not matter here, and the true ones take seconds to measure."""
    monkeypatch.setattr(machine, "_PRODUCT", {"cpu": (64, 64, 64)})
    monkeypatch.setattr(machine, "_COPIED", {"cpu": 2**16})


@pytest.mark.usefixtures("small_limits")
def test_the_command_measures_random_weights(tmp_path, capsys):
    file = tmp_path / "profile.json"
    options = ["--sizes", "128x128", "128x192", "--repeats", "1", "--new-tokens", "2", "--dtype", "float32"]
    options += ["--vision-backend", "eager", "channels-last"]
    assert cli.main(["profile", "--text", "tiny", *options, "--output", str(file)]) == 0
    printed = capsys.readouterr().out
    results = json.loads(file.read_text())
    assert {(row["tower"], row["width"], row["tokens"]) for row in results["tower"]} == {
        (tower, width, tokens) for tower in ("eager", "channels-last") for width, tokens in ((128, 4), (192, 6))
    }
    for row in results["tower"]:
        assert row["share"] == pytest.approx(row["operations"] / row["seconds"] / row["rate"])
        assert row["change"] < 1e-5
    assert [row["prompt_tokens"] for row in results["answers"]] == [52, 54]
    assert [row["side"] for row in results["preparing"]] == [128, 192]
    assert results["machine"]["dtype"] == "float32" and results["machine"]["versions"]["pillow"] == PIL.__version__
    for words in ("Matrix products: ", "| channels-last | 128 x 192 | 6 |", "Preprocessing"):
        assert words in printed


@pytest.mark.usefixtures("small_limits")
def test_the_command_measures_a_checkpoint(checkpoint, capsys):
    options = ["--sizes", "128x128", "--repeats", "1", "--new-tokens", "2", "--device", "cpu", "--dtype", "float32"]
    assert cli.main(["profile", str(checkpoint), *options]) == 0
    assert capsys.readouterr().out.startswith(str(checkpoint))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--text", "tiny", "--sizes", "100x128"], "100"),
        (["--quantization", "8bit"], "name a checkpoint"),
        (["--text", "tiny", "--vision-backend", "cuda-graphs", "--device", "cpu"], "needs CUDA"),
        (["nowhere/at-all"], "nowhere/at-all"),
    ],
)
def test_mistakes_are_refused(options, message, capsys):
    assert cli.main(["profile", *options]) == 2
    assert message in capsys.readouterr().err


def test_each_way_gets_a_tower_of_its_own():
    """What one replaces, the next must not find."""
    from convllava_hf.inference.vision_backends import _layers
    from convllava_hf.profiling.vision_tower import copy_of

    tower = built(lambda: ConvLlavaVisionTower(tower_config(tiny=True)), CPU, torch.float32)
    other = copy_of(tower)
    _layers(other)[0].pwconv1 = nn.Identity()
    assert isinstance(_layers(tower)[0].pwconv1, nn.Linear)
    pixels = torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        assert torch.equal(copy_of(tower)(pixels).last_hidden_state, tower(pixels).last_hidden_state)
