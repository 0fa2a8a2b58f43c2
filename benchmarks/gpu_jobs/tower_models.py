"""The towers that `tower.py` and `profile_tower.py` measure: true shapes, random weights, and the ways to run ours."""

import functools
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from job import Context, milliseconds
from torch import nn

from convllava_hf.inference.vision_backends import VISION_BACKENDS, optimize_vision_tower
from convllava_hf.modeling.modeling_convllava import ConvLlavaVisionTower
from convllava_hf.profiling.machine import product
from convllava_hf.profiling.measuring import operations
from convllava_hf.profiling.models import built, tower_config


DTYPE = torch.bfloat16
CLIP_L = {"hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 24, "num_attention_heads": 16}
SO400M = {"hidden_size": 1152, "intermediate_size": 4304, "num_hidden_layers": 27, "num_attention_heads": 16}
TINY_VIT = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}
Size = tuple[int, int]


class FastViT(nn.Module):
    """FastVLM's tower as transformers builds it: `inference_mode=True`, its parallel branches merged into one."""

    def __init__(self, name: str):
        super().__init__()
        import timm

        self.model = timm.create_model(name, pretrained=False, inference_mode=True, num_classes=0)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return self.model.forward_features(images)


def maker(kind: str, side: int, tiny: bool, attention: str = "sdpa") -> Callable[[], nn.Module]:
    """What builds a tower of this kind; CLIP and SigLIP have a position for each patch of `side` x `side` pixels."""
    from transformers import CLIPVisionConfig, CLIPVisionModel, SiglipVisionConfig, SiglipVisionModel

    if kind == "ours":
        return lambda: ConvLlavaVisionTower(tower_config(tiny))
    if kind == "FastViT mci3":
        return lambda: FastViT("fastvit_t8" if tiny else "fastvit_mci3")
    common = {"image_size": side, "patch_size": 14, "attn_implementation": attention}
    if kind == "CLIP ViT-L/14":
        return lambda: CLIPVisionModel(CLIPVisionConfig(**common, **(TINY_VIT if tiny else CLIP_L)))
    shape = TINY_VIT if tiny else SO400M
    return lambda: SiglipVisionModel(SiglipVisionConfig(**common, **shape, vision_use_head=False))


@functools.lru_cache(maxsize=1)  # the last one: the cases of one tower follow one another
def tower(kind: str, way: str, side: int, tiny: bool, device: torch.device) -> nn.Module:
    """A tower with random weights in bfloat16, run one way of `apply_way`."""
    torch._dynamo.reset()
    module = built(maker(kind, side, tiny), device, DTYPE)
    apply_way(module, way, "aot_eager" if tiny and device.type == "cpu" else "inductor")
    return module


def apply_way(module: nn.Module, way: str, backend: str = "inductor") -> None:
    """Changes a tower of ours in place.

    The ways of `vision_backends.VISION_BACKENDS` are the package's own. Those of this script compile the blocks one by
    one, all those of a stage from one compilation ("blocks compiled"), with sizes left open ("blocks dynamic"); or the
    package's parts with other options of torch.compile ("stages dynamic", "stages autotuned").

    Args:
        backend: of this script's own compilations; inductor's of a CPU take too long for a rehearsal.
    """
    # The stages share one function, so torch's limit of 8 compilations is reached at the second size of image, and
    # what is beyond it runs eagerly, which nobody could tell from the figures.
    torch._dynamo.config.recompile_limit = 256
    torch._dynamo.config.accumulated_recompile_limit = 1024
    if way in VISION_BACKENDS:
        if way != "eager":
            optimize_vision_tower(module, way)
        return
    optimize_vision_tower(module, "channels-last")
    if way in ("blocks compiled", "blocks dynamic"):
        for stage in module.encoder.stages:
            for layer in stage.layers:
                layer.compile(dynamic=way == "blocks dynamic", backend=backend)
        return
    options = {
        "stages dynamic": {"dynamic": True},
        "stages autotuned": {"dynamic": False, "mode": "max-autotune-no-cudagraphs"},
    }[way]
    for part in (module.embeddings, *module.encoder.stages):
        part.compile(**options, backend=backend)


def images(size: Size, batch: int, device: torch.device) -> torch.Tensor:
    """Noise, one image repeated: (batch, 3, height, width)."""
    generator = torch.Generator(device).manual_seed(1)
    one = torch.randn(1, 3, *size, generator=generator, device=device, dtype=torch.float32)
    return one.to(DTYPE).repeat(batch, 1, 1, 1)


def features_of(output: Any) -> torch.Tensor:
    return output if isinstance(output, torch.Tensor) else output.last_hidden_state


@functools.cache
def flops(kind: str, size: Size, tiny: bool) -> int:
    """Of one image. Attention is written out, which is what torch's counter knows on tensors without storage."""
    return operations(maker(kind, max(size), tiny, "eager"), (1, 3, *size))


@functools.cache
def _product(device: torch.device) -> tuple[Callable[[], Any], float]:
    if device.type == "cpu":  # a rehearsal: the product of the package's own measurement takes a second there
        left = torch.randn(256, 256, dtype=DTYPE)
        return lambda: left @ left, 2.0 * 256**3
    return product(device, DTYPE)


def matrix_rate(context: Context) -> float:
    """Operations a second of a large product in bfloat16."""
    call, counted = _product(context.device)
    return counted / milliseconds(call, context, repeats=10) * 1000


@functools.cache
def reference(size: Size, tiny: bool, device: torch.device) -> torch.Tensor:
    """Features of one image in float32 arithmetic, eager, without TensorFloat-32, of the same weights."""
    module = _reference_tower(tiny, device)
    allowed = torch.backends.cudnn.allow_tf32
    torch.backends.cudnn.allow_tf32 = False
    try:
        with torch.inference_mode():
            return features_of(module(images(size, 1, device).float())).clone()
    finally:
        torch.backends.cudnn.allow_tf32 = allowed


@functools.cache
def _reference_tower(tiny: bool, device: torch.device) -> nn.Module:
    return built(maker("ours", 0, tiny), device, DTYPE).float()


def change(features: torch.Tensor, size: Size, tiny: bool) -> float:
    """How far the first image's features are from the reference's: the norm of the difference by the norm."""
    expected = reference(size, tiny, features.device)
    return float((features[:1].float() - expected).norm() / expected.norm())


@dataclass
class Graph:
    """A call of a module, recorded once as a CUDA graph by hand, with no compiler."""

    module: nn.Module
    pixels: torch.Tensor

    def __post_init__(self):
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):  # libraries take their workspaces, compilers compile
            for _ in range(3):
                self.module(self.pixels)
        torch.cuda.current_stream().wait_stream(stream)
        self.graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self.graph):
            self.output = self.module(self.pixels)

    def __call__(self) -> Any:
        self.graph.replay()
        return self.output


def time_call(call: Callable[[], Any], context: Context, most_ms: float = 700) -> tuple[float, float, Any]:
    """Milliseconds (median of as many calls as take `most_ms`, 3 to 20), seconds of the first call, and its output."""
    _synchronize(context)
    started = time.perf_counter()
    output = call()
    _synchronize(context)
    first = time.perf_counter() - started
    call()  # inductor records its CUDA graphs in the second call
    _synchronize(context)
    started = time.perf_counter()
    call()
    _synchronize(context)
    third = (time.perf_counter() - started) * 1000
    repeats = max(3, min(20, int(most_ms / third)))
    return milliseconds(call, context, repeats, warm_up=0), first, output


def _synchronize(context: Context) -> None:
    if context.device.type == "cuda":
        torch.cuda.synchronize()


def measure(kind: str, way: str, size: Size, batch: int, context: Context, graph: bool = False) -> dict[str, Any]:
    """One row. A way that ends in a graph of our own making times the replay of it."""
    module = tower(kind, way, 0 if kind in ("ours", "FastViT mci3") else max(size), context.tiny, context.device)
    pixels = images(size, batch, context.device)
    rate = matrix_rate(context)
    before = _allocated(context)
    if context.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    with torch.inference_mode():
        started = time.perf_counter()
        call = Graph(module, pixels) if graph else lambda: module(pixels)
        prepared = time.perf_counter() - started
        ms, first, output = time_call(call, context)
        features = features_of(output)
        if not torch.isfinite(features).all():
            raise RuntimeError(f"The features of {kind}, {way}, at {size} are not finite.")
    counted = batch * flops(kind, size, context.tiny)
    most = torch.cuda.max_memory_allocated() if context.device.type == "cuda" else None
    row = {
        "ms": ms,
        "first_call_s": prepared + first,
        "images_per_s": batch / ms * 1000,
        "tflop": counted / 1e12,
        "share": counted / ms * 1000 / rate,
        "rate": rate,
        "weights": sum(parameter.numel() * parameter.element_size() for parameter in module.parameters()),
        "activations": None if most is None else most - before,
        "tokens": features.shape[-2] * (features.shape[-1] if features.ndim == 4 else 1),
    }
    if kind == "ours":
        row["change"] = change(features, size, context.tiny)
    return row


def _allocated(context: Context) -> int:
    return torch.cuda.memory_allocated() if context.device.type == "cuda" else 0
