"""Faster ways to run the tower give the features of the plain one: equal but for rounding, or nearly for integers."""

import copy
import threading

import pytest
import torch
from helpers.tiny_models import make_image, make_model, randomized

from convllava_hf import ConvLlavaConfig
from convllava_hf.errors import ConvLlavaError
from convllava_hf.inference import load, user_turn, vision_backends
from convllava_hf.inference.vision_backends import choose_vision_backend, optimize_vision_tower
from convllava_hf.modeling.modeling_convllava import ConvLlavaVisionTower


CPU = torch.device("cpu")


def possible(tower: str, dtype: torch.dtype) -> None:
    if reason := vision_backends._why_not(tower, CPU, dtype):
        pytest.skip(reason)


def make_tower(dtype: torch.dtype, device: str = "cpu") -> ConvLlavaVisionTower:
    vision = {"depths": [1, 1, 2, 1, 1], "hidden_sizes": [32, 32, 64, 64, 128], "image_size": 128}
    return randomized(ConvLlavaVisionTower(ConvLlavaConfig(vision_config=vision).vision_config)).to(device, dtype)


def change(tower: str, dtype: torch.dtype, device: str = "cpu", sizes=None) -> tuple[float, float]:
    """Relative change of features by this way, and by the dtype alone against float32."""
    plain = make_tower(dtype, device)
    fast = copy.deepcopy(plain)
    optimize_vision_tower(fast, tower)
    pixels = torch.randn(2, 3, 128, 192, device=device)
    with torch.inference_mode():
        exact = make_tower(torch.float32, device)(pixels, image_sizes=sizes).last_hidden_state
        expected = plain(pixels.to(dtype), image_sizes=sizes).last_hidden_state.float()
        given = fast(pixels.to(dtype), image_sizes=sizes).last_hidden_state
        again = fast(pixels.to(dtype), image_sizes=sizes).last_hidden_state
    assert given.dtype == dtype and given.shape == exact.shape
    assert torch.equal(given, again)
    norm = exact.norm()
    return float((given.float() - expected).norm() / norm), float((expected - exact).norm() / norm)


@pytest.mark.parametrize("sizes", [None, [(128, 192), (64, 128)]])
def test_fused_products_differ_by_rounding_alone(sizes):
    possible("fused", torch.bfloat16)
    fused, rounding = change("fused", torch.bfloat16, sizes=sizes)
    assert 0 < fused < 2 * rounding


def test_channels_last_differs_by_rounding_alone():
    assert change("channels-last", torch.float32)[0] < 1e-5


@pytest.fixture
def no_compiler(monkeypatch):
    monkeypatch.setattr(vision_backends, "_rounding", lambda: vision_backends._to_integers)


@pytest.mark.usefixtures("no_compiler")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_integers_differ_little(dtype):
    possible("int8", dtype)
    integers, _ = change("int8", dtype)
    assert 1e-4 < integers < 0.03


@pytest.mark.usefixtures("no_compiler")
def test_an_integer_product_is_the_product_of_the_rounded():
    """Against the definition, in floating point."""
    possible("int8", torch.float32)
    linear = torch.nn.Linear(32, 48)
    scale = torch.rand(48) + 0.5
    fast = vision_backends.Int8Linear(linear, scale, gelu=True)
    features = torch.randn(3, 5, 32) * 2 - 0.3
    step = (features.max() - features.min()) / 255
    zero = (-features.min() / step).round()
    rounded = ((features / step + zero).round().clamp(0, 255) - zero) * step
    weight = linear.weight * scale[:, None]
    steps = weight.abs().amax(dim=1, keepdim=True) / 127
    expected = torch.nn.functional.gelu(rounded @ ((weight / steps).round() * steps).T + linear.bias * scale)
    assert fast(features).shape == (3, 5, 48)
    torch.testing.assert_close(fast(features), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("tower", ["compiled", "int8"])
def test_compiled_on_a_cpu(tower):
    dtype = torch.float32
    possible(tower, dtype)
    torch.compiler.reset()
    assert change(tower, dtype, sizes=[(128, 192), (64, 128)])[0] < (1e-5 if tower == "compiled" else 0.03)


@pytest.mark.slow
def test_every_size_of_image_is_compiled(monkeypatch):
    """torch.compile would stop at 8 compilations of the function that all stages share, and go on without."""
    compiled = []
    compile_module = torch.nn.Module.compile

    def backend(graph, inputs):
        compiled.append(graph)
        return graph.forward

    monkeypatch.setattr(
        torch.nn.Module, "compile", lambda self, mode, dynamic: compile_module(self, backend=backend, dynamic=dynamic)
    )
    monkeypatch.setattr(vision_backends, "_why_not", lambda *args: None)
    torch.compiler.reset()
    tower = make_tower(torch.float32)
    optimize_vision_tower(tower, "compiled")
    with (
        torch.inference_mode(),
        torch._dynamo.config.patch(assume_static_by_default=True, automatic_dynamic_shapes=False),
    ):
        for number in range(1, 5):
            tower(torch.randn(2, 3, 64 * number, 128))
            assert len(compiled) == 6 * number  # the stem and five stages
    torch.compiler.reset()


def test_recorded_graphs_are_known_to_every_thread():
    from torch._inductor import cudagraph_trees

    found = []

    def look() -> None:
        vision_backends._share_graphs()
        found.append(cudagraph_trees.local.tree_manager_containers)
        found.append(cudagraph_trees.get_obj(cudagraph_trees.local, "tree_manager_locks"))

    look()
    thread = threading.Thread(target=look)
    thread.start()
    thread.join()
    assert len(found) == 4 and found[0] is found[2] and found[1] is found[3]


@pytest.mark.parametrize(("missing", "message"), [("triton", "needs Triton"), ("compiler", "Triton needs one of gcc")])
def test_compiling_for_cuda_needs_triton_and_a_compiler(missing, message, monkeypatch):
    monkeypatch.setattr(
        vision_backends.importlib.util, "find_spec", lambda name: None if missing == "triton" else object()
    )
    monkeypatch.setattr(vision_backends.shutil, "which", lambda name: None)
    for tower in ("compiled", "cuda-graphs"):
        with pytest.raises(ConvLlavaError, match=message):
            choose_vision_backend(torch.device("cuda"), torch.bfloat16, tower)


@pytest.mark.usefixtures("no_compiler")
@pytest.mark.parametrize("tower", ["fused", "int8"])
def test_a_model_answers_with_it(tower, checkpoint):
    possible(tower, torch.bfloat16)
    assistant = load(checkpoint, device="cpu", dtype="bfloat16", vision_backend=tower)
    assert assistant.answer([user_turn("What?", [make_image()])], max_new_tokens=3).token_ids


def test_the_way_chosen(monkeypatch):
    assert choose_vision_backend(CPU, torch.float32) == "eager"
    assert choose_vision_backend(torch.device("cuda"), torch.bfloat16) == "eager"
    monkeypatch.setattr(vision_backends, "_why_not", lambda *args: None)
    assert choose_vision_backend(CPU, torch.bfloat16) == "fused"


@pytest.mark.parametrize(
    ("tower", "device", "dtype", "message"),
    [
        ("quick", "cpu", torch.float32, "Unknown vision backend 'quick'"),
        ("cuda-graphs", "cpu", torch.float32, "needs CUDA"),
        ("fused", "cpu", torch.float32, "needs bfloat16"),
        ("int8", "cuda", torch.bfloat16, "is for a CPU"),
        ("int8", "cpu", torch.float16, "needs bfloat16 or float32"),
    ],
)
def test_ways_that_cannot_be_taken_are_refused(tower, device, dtype, message):
    with pytest.raises(ConvLlavaError, match=message):
        choose_vision_backend(torch.device(device), dtype, tower)


@pytest.mark.usefixtures("no_compiler")
def test_a_tower_is_changed_once():
    possible("int8", torch.float32)
    model = make_model()
    optimize_vision_tower(model.vision_tower, "int8")
    with pytest.raises(ConvLlavaError, match="replaced before"):
        optimize_vision_tower(model.vision_tower, "int8")


def test_a_quantized_tower_stays_as_it_is(checkpoint, tmp_path, monkeypatch):
    """By default, that is; whoever asks for more is told why not."""
    possible("fused", torch.bfloat16)

    class Quantized(torch.nn.Linear):
        pass

    build = ConvLlavaVisionTower.__init__

    def init(self, config):
        build(self, config)
        for layer in vision_backends._layers(self):
            layer.pwconv1.__class__ = Quantized

    monkeypatch.setattr(ConvLlavaVisionTower, "__init__", init)
    tower = load(checkpoint, device="cpu", dtype="bfloat16").model.vision_tower
    assert {type(layer.pwconv1) for layer in vision_backends._layers(tower)} == {Quantized}
    with pytest.raises(ConvLlavaError, match="quantized"):
        load(checkpoint, device="cpu", dtype="bfloat16", vision_backend="fused")
