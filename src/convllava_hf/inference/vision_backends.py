"""Vision backends: ways to run the vision tower faster, for inference only, and where each one works.

Measured in benchmarks/README.md, with the change in features that each costs.
"""

import collections
import functools
import importlib.util
import os
import shutil
import threading
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from ..errors import ConvLlavaError
from ..modeling.modeling_convllava import ConvLlavaVisionTower
from ..options import VISION_BACKENDS


_COMPILERS = ("g++", "clang++", "c++")
_TRITON_COMPILERS = ("gcc", "clang", "cc")
# torch.compile gives up after 8 compilations of one function, and goes on without compiling; all stages share theirs,
# and each new size of image is a compilation for each of them.
_MOST_COMPILATIONS = 1024
_GRAPHS: dict[str, Any] = {}  # what torch knows of recorded CUDA graphs, for all threads: see `_share_graphs`
_Locks = functools.partial(collections.defaultdict, threading.Lock)


def choose_vision_backend(device: torch.device, dtype: torch.dtype, tower: str | None = None) -> str:
    """The backend asked for, or the fastest that changes features only by rounding and needs no time to start.

    Raises:
        ConvLlavaError: there is no such backend, or it does not work with this device, dtype or build of torch.
    """
    if tower is None:
        return "fused" if _why_not("fused", device, dtype) is None else "eager"
    if tower not in VISION_BACKENDS:
        raise ConvLlavaError(f"Unknown vision backend {tower!r}: choose one of {', '.join(VISION_BACKENDS)}.")
    if reason := _why_not(tower, device, dtype):
        raise ConvLlavaError(
            f"The vision backend {tower!r} cannot be used here: {reason}. Choose another of "
            f"{', '.join(VISION_BACKENDS)}."
        )
    return tower


def _why_not(tower: str, device: torch.device, dtype: torch.dtype) -> str | None:
    """What this backend lacks here; `None` if it works."""
    if tower in ("cuda-graphs", "triton", "triton-graphs") and device.type != "cuda":
        return f"it needs CUDA, and the device is {device}"
    if tower in ("fused", "int8"):
        if device.type != "cpu":
            return f"it is for a CPU, and the device is {device}"
        if not torch.backends.mkldnn.is_available():
            return "this torch was built without oneDNN"
    if tower == "fused":
        if dtype != torch.bfloat16:
            return f"it needs bfloat16, and the dtype is {dtype}"
        if not torch.ops.mkldnn._is_mkldnn_bf16_supported():
            return "this CPU has no instructions for bfloat16 that oneDNN could use"
        if not hasattr(torch.ops.mkldnn, "_linear_pointwise"):
            return f"torch {torch.__version__} lacks the operation"
    if tower == "int8":
        if dtype not in (torch.bfloat16, torch.float32):
            return f"it needs bfloat16 or float32 around the integers, and the dtype is {dtype}"
        if not hasattr(torch.ops.onednn, "qlinear_pointwise"):
            return f"torch {torch.__version__} lacks the operation"
    if tower == "compiled" and device.type == "cpu" and not _has_compiler():
        return f"compiling needs one of {', '.join(_COMPILERS)}"
    if tower.startswith("triton") and dtype not in (torch.bfloat16, torch.float16, torch.float32):
        return f"it needs bfloat16, float16 or float32, and the dtype is {dtype}"
    if tower in ("compiled", "cuda-graphs", "triton", "triton-graphs") and device.type == "cuda":
        if importlib.util.find_spec("triton") is None:
            return "compiling for CUDA needs Triton"
        if not any(shutil.which(name) for name in (os.environ.get("CC", ""), *_TRITON_COMPILERS) if name):
            return f"Triton needs one of {', '.join(_TRITON_COMPILERS)}"
    return None


@torch.no_grad()
def optimize_vision_tower(vision_tower: ConvLlavaVisionTower, tower: str) -> None:
    """Changes a `ConvLlavaVisionTower` in place, so that it uses one of `VISION_BACKENDS`.

    Afterwards it can be neither trained nor saved, except with "eager" and "channels-last".

    Raises:
        ConvLlavaError: see `choose_vision_backend`; or the tower was changed before.
    """
    weight = vision_tower.embeddings.patch_embeddings.weight
    choose_vision_backend(weight.device, weight.dtype, tower)
    layers = _layers(vision_tower)
    if tower in ("fused", "int8", "triton", "triton-graphs") and not has_unmodified_linears(vision_tower):
        raise ConvLlavaError(
            f"The vision backend {tower!r} cannot be used: the tower's matrix products are quantized or were replaced "
            "before. Load a checkpoint whose tower is not quantized, and change it once."
        )
    if tower == "fused":
        _replace_products(layers, vision_tower.config.hidden_act, FusedLinear)
    elif tower == "int8":
        _replace_products(layers, vision_tower.config.hidden_act, Int8Linear)
    elif tower in ("channels-last", "compiled", "cuda-graphs"):
        vision_tower.to(memory_format=torch.channels_last)  # pyright: ignore[reportCallIssue]
        vision_tower.register_forward_pre_hook(_channels_last, with_kwargs=True)
    elif tower in ("triton", "triton-graphs"):
        use_triton(vision_tower, with_graphs=tower == "triton-graphs")
    if tower == "compiled":
        _compile(vision_tower, None)
    elif tower == "cuda-graphs":
        _compile(vision_tower, "reduce-overhead")


def has_unmodified_linears(vision_tower: ConvLlavaVisionTower) -> bool:
    """Whether all matrix products of the blocks are torch's own, neither quantized nor replaced."""
    products = [linear for layer in _layers(vision_tower) for linear in (layer.pwconv1, layer.pwconv2)]
    return all(type(linear) is nn.Linear and type(linear.weight) is nn.Parameter for linear in products)


def _layers(vision_tower: ConvLlavaVisionTower) -> list[Any]:
    stages: Any = vision_tower.encoder.stages
    return [layer for stage in stages for layer in stage.layers]


def use_triton(vision_tower: nn.Module, with_graphs: bool) -> None:
    """Puts a `TritonTower` in place of the tower's forward, and layer scale into the weights of the second product.

    Raises:
        ConvLlavaError: the tower is on several devices.
    """
    from .triton_tower import TritonTower

    devices = sorted({str(parameter.device) for parameter in vision_tower.parameters()})
    if len(devices) > 1:
        raise ConvLlavaError(
            f"The tower cannot be run by Triton's kernels on {', '.join(devices)}: they need one device. Choose the "
            "vision backend 'eager', or a device map that keeps it whole."
        )
    for layer in _layers(vision_tower):
        if layer.layer_scale_parameter is not None:
            second = layer.pwconv2
            weight, bias = _scaled(second, layer.layer_scale_parameter)
            second.weight = nn.Parameter(weight.to(second.weight.dtype), requires_grad=False)
            second.bias = nn.Parameter(bias.to(second.bias.dtype), requires_grad=False)
            layer.layer_scale_parameter = None
    vision_tower.to(memory_format=torch.channels_last)
    vision_tower.forward = TritonTower(vision_tower, with_graphs).forward


def _channels_last(module: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
    if "pixel_values" in kwargs:
        pixels = kwargs["pixel_values"].contiguous(memory_format=torch.channels_last)
        return args, {**kwargs, "pixel_values": pixels}
    return (args[0].contiguous(memory_format=torch.channels_last), *args[1:]), kwargs


def _compile(vision_tower: ConvLlavaVisionTower, mode: str | None) -> None:
    """Compiles embeddings and stages; what looks at the sizes of single images stays in Python."""
    for module in (vision_tower.embeddings, *vision_tower.encoder.stages):
        module.compile(mode=mode, dynamic=False)
    vision_tower.forward = _compiling_every_size(vision_tower.forward)
    if mode is not None:
        vision_tower.forward = _replaying_graphs(vision_tower.forward)


def _compiling_every_size(forward: Callable) -> Callable:
    """A tower's forward during which torch.compile may compile as often as there are sizes of images."""

    @functools.wraps(forward)
    def compiling(*args, **kwargs):
        limits = {"recompile_limit": _MOST_COMPILATIONS, "accumulated_recompile_limit": _MOST_COMPILATIONS}
        with torch._dynamo.config.patch(limits):
            return forward(*args, **kwargs)

    return compiling


def _replaying_graphs(forward: Callable) -> Callable:
    """A tower's forward whose parts are CUDA graphs, for one thread at a time."""
    lock = threading.Lock()

    @functools.wraps(forward)
    def replaying(*args, **kwargs):
        with lock:
            _share_graphs()
            torch.compiler.cudagraph_mark_step_begin()
            output = forward(*args, **kwargs)
            # A graph writes its output to the same memory each time: what a caller keeps must be a copy.
            output.last_hidden_state = output.last_hidden_state.clone()
            return output

    return replaying


def _share_graphs() -> None:
    """Lets this thread use the graphs that others have recorded.

    torch keeps them by thread, and up to 2.11 fails in threads that it has not prepared itself. The demo answers each
    question in a new one.
    """
    from torch._inductor import cudagraph_trees

    local = getattr(cudagraph_trees, "local", None)
    if local is None:
        return
    for name, kind in (("tree_manager_containers", dict), ("tree_manager_locks", _Locks)):
        if name not in _GRAPHS:
            _GRAPHS[name] = getattr(local, name) if hasattr(local, name) else kind()
        setattr(local, name, _GRAPHS[name])


def _replace_products(layers: list[Any], activation: str, kind: type) -> None:
    """The two products of every block by faster ones; the second takes the layer scale into its weights."""
    for layer in layers:
        fuses = activation == "gelu"
        layer.pwconv1 = kind(layer.pwconv1, None, gelu=fuses)
        layer.pwconv2 = kind(layer.pwconv2, layer.layer_scale_parameter, gelu=False)
        layer.layer_scale_parameter = None
        if fuses:
            layer.act = nn.Identity()


def _scaled(linear: nn.Linear, scale: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor]:
    """Weight (out, in) and bias (out,) in float32, with a factor for each output taken in."""
    weight, bias = linear.weight.float(), linear.bias.float()
    return (weight, bias) if scale is None else (weight * scale.float()[:, None], bias * scale.float())


class FusedLinear(nn.Module):
    """A linear layer, and perhaps GELU, in one oneDNN operation.

    torch's own copies the bias over the whole output before each product, and GELU goes through memory once more.
    """

    def __init__(self, linear: nn.Linear, scale: torch.Tensor | None, gelu: bool):
        super().__init__()
        weight, bias = (linear.weight, linear.bias) if scale is None else _scaled(linear, scale)
        self.weight = nn.Parameter(weight.to(linear.weight.dtype), requires_grad=False)
        self.bias = nn.Parameter(bias.to(linear.bias.dtype), requires_grad=False)
        self.operation = "gelu" if gelu else "none"

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        return torch.ops.mkldnn._linear_pointwise(features, self.weight, self.bias, self.operation, [], "none")


class Int8Linear(nn.Module):
    """A linear layer, and perhaps GELU, as a product of integers.

    Weights are rounded to 8 bits once, with a scale for each output. Features are rounded to 8 bits in each call, from
    their smallest to their largest value.
    """

    def __init__(self, linear: nn.Linear, scale: torch.Tensor | None, gelu: bool):
        super().__init__()
        weight, bias = _scaled(linear, scale)
        scales = weight.abs().amax(dim=1).clamp(min=1e-12) / 127
        integers = (weight / scales[:, None]).round().clamp(-127, 127).to(torch.int8)
        # In oneDNN's own order, which torch can neither move to another device nor save: no buffer.
        self._weight = torch.ops.onednn.qlinear_prepack(integers, None)
        self._scales, self._bias = scales, bias
        self._zeros = torch.zeros(len(scales), dtype=torch.int64)
        self.dtype = linear.weight.dtype
        self.operation = "gelu" if gelu else "none"
        self._round = _rounding()

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        rows = features.reshape(-1, features.shape[-1])  # (..., in) -> (positions, in)
        low, high = (extreme.item() for extreme in torch.aminmax(rows))
        low, high = min(low, 0.0), max(high, 0.0)
        step = max((high - low) / 255, 1e-12)
        zero = round(-low / step)
        integers = self._round(rows, torch.tensor(1 / step), torch.tensor(float(zero)))
        product = torch.ops.onednn.qlinear_pointwise(
            integers, step, zero, self._weight, self._scales, self._zeros, self._bias, 1.0, 0, self.dtype,
            self.operation, [], "none",
        )  # fmt: skip
        return product.unflatten(0, features.shape[:-1])


def _to_integers(rows: torch.Tensor, factor: torch.Tensor, zero: torch.Tensor) -> torch.Tensor:
    return (rows.float() * factor + zero).round().clamp(0, 255).to(torch.uint8)


@functools.cache
def _rounding() -> Callable:
    """Compiled where there is a compiler: as single operations, rounding goes through memory five times."""
    return torch.compile(_to_integers, dynamic=True) if _has_compiler() else _to_integers


def _has_compiler() -> bool:
    return any(shutil.which(name) for name in (os.environ.get("CXX", ""), *_COMPILERS) if name)
