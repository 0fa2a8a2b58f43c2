"""Faster ways to run the tower on a GPU: the features of the eager one, for every size of image and for every call."""

import copy
import threading

import pytest
import torch
from helpers.tiny_models import make_image, randomized

from convllava_hf import ConvLlavaConfig
from convllava_hf.inference import load, user_turn
from convllava_hf.inference.vision_backends import _why_not, optimize_vision_tower
from convllava_hf.modeling.modeling_convllava import ConvLlavaVisionTower

from .devices import CUDA, DEVICE, deviation, needs_cuda


pytestmark = [pytest.mark.gpu, pytest.mark.usefixtures("fresh_compiler")]

STAGES = 5 if CUDA else 2  # on a CPU compiling is slow
SIDE = 32 * 2 ** (STAGES - 1)  # pixels, as many as eight visual tokens
# Batch, height, width, and the sizes that the images cover of it.
SHAPES = [
    (2, SIDE, SIDE, None),
    (1, SIDE, 2 * SIDE, None),
    (2, 2 * SIDE, SIDE, [(2 * SIDE, SIDE), (SIDE // 2, SIDE // 2)]),
]
# Compiling takes most of the time of all tests: each way in one dtype.
VISION_BACKENDS = [
    ("channels-last", torch.float32),
    ("channels-last", torch.bfloat16),
    ("compiled", torch.float32),
    pytest.param("cuda-graphs", torch.bfloat16, marks=needs_cuda),
    *(
        pytest.param(tower, dtype, marks=needs_cuda)
        for tower in ("triton", "triton-graphs")
        for dtype in (torch.bfloat16, torch.float16, torch.float32)
    ),
]


def make_tower(dtype: torch.dtype) -> ConvLlavaVisionTower:
    vision = {
        "depths": [1] * STAGES,
        "num_stages": STAGES,
        "hidden_sizes": [32, 32, 64, 64, 128][:STAGES],
        "image_size": SIDE,
    }
    return randomized(ConvLlavaVisionTower(ConvLlavaConfig(vision_config=vision).vision_config)).to(DEVICE, dtype)


def seen(features: torch.Tensor, sizes, stride: int) -> torch.Tensor:
    """The features of images without those of the padding, which mean nothing."""
    if sizes is None:
        return features.flatten()
    parts = zip(features, sizes, strict=True)
    return torch.cat([one[:, : height // stride, : width // stride].flatten() for one, (height, width) in parts])


def possible(tower: str, dtype: torch.dtype) -> None:
    if reason := _why_not(tower, DEVICE, dtype):
        pytest.skip(reason)


@pytest.mark.parametrize(("tower", "dtype"), VISION_BACKENDS)
def test_features_are_the_eager_tower_s_for_all_sizes_and_calls(tower, dtype):
    """Those of earlier calls, too, when later ones have been made: graphs write to the same memory each time."""
    possible(tower, dtype)
    plain = make_tower(dtype)
    fast, exact = copy.deepcopy(plain), make_tower(torch.float32)
    optimize_vision_tower(fast, tower)
    kept = []
    with torch.inference_mode():
        for _ in range(2):
            for batch, height, width, sizes in SHAPES:
                pixels = torch.randn(batch, 3, height, width, device=DEVICE)
                calls = [
                    call(given, image_sizes=sizes).last_hidden_state
                    for call, given in ((fast, pixels.to(dtype)), (plain, pixels.to(dtype)), (exact, pixels))
                ]
                assert calls[0].dtype == dtype and calls[0].shape == calls[1].shape
                kept.append([seen(one, sizes, fast.stride) for one in calls])
    for ours, eager, truth in kept:
        noise = deviation(eager, truth) if dtype != torch.float32 else 2e-5
        assert deviation(ours, eager) < 2 * noise
    if tower in ("compiled", "cuda-graphs"):  # stem and stages, for each size: none was given up on
        assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == (1 + STAGES) * len(SHAPES)


@needs_cuda
@pytest.mark.parametrize("tower", ["cuda-graphs", "triton-graphs"])
def test_graphs_in_threads_of_their_own(tower):
    """As the demo answers, each question in a new thread."""
    possible(tower, torch.bfloat16)
    plain = make_tower(torch.bfloat16)
    fast = copy.deepcopy(plain)
    optimize_vision_tower(fast, tower)
    pixels = torch.randn(1, 3, SIDE, SIDE, device=DEVICE, dtype=torch.bfloat16)
    found: list = []

    def run() -> None:
        try:
            with torch.inference_mode():
                found.append([fast(pixels).last_hidden_state for _ in range(3)])
        except Exception as error:  # pytest sees none of a thread
            found.append(error)

    with torch.inference_mode():
        expected = plain(pixels).last_hidden_state
    for _ in range(2):
        thread = threading.Thread(target=run)
        thread.start()
        thread.join()
    for one in found:
        if isinstance(one, Exception):
            raise one
        for features in one:
            torch.testing.assert_close(features, expected, rtol=5e-2, atol=5e-2)


@needs_cuda
@pytest.mark.parametrize("tower", ["channels-last", "cuda-graphs", "triton", "triton-graphs"])
def test_answers_are_those_of_the_eager_tower(tower, checkpoint, device):
    possible(tower, torch.float32)
    eager, fast = (load(checkpoint, device=device, dtype="float32", vision_backend=name) for name in ("eager", tower))
    for _ in range(2):  # a graph is recorded in the second call and replayed from the third on
        for seed in range(2):
            turn = [user_turn("What?", [make_image(seed=seed)])]
            assert fast.answer(turn, max_new_tokens=8).token_ids == eager.answer(turn, max_new_tokens=8).token_ids
