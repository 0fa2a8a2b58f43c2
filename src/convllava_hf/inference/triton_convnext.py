"""Triton kernels for a ConvNeXt in inference, on features whose channels lie together: (N, H, W, C), contiguous.

A block takes five launches: the depthwise convolution, layer norm, torch's product, GELU, and a product that is
accumulated onto the residual. The rest of torch's operations (bias, layer scale, residual, masks) is in these five.

A new image size compiles nothing: sizes are runtime arguments, which Triton is kept from specializing on. It does
compile once for each number of channels and each dtype, and tries the configurations of the convolution then.
"""

import functools
from typing import Any

import torch
import triton
import triton.language as tl


# Of the convolution: columns of pixels and warps of a program, without spilled registers on sm_90. What is fastest
# depends on the number of channels.
_CONFIGS = ((8, 1), (16, 4), (32, 4), (32, 8))
_MOST_CHANNELS = 64  # of a program of the convolution: 128 bytes of bfloat16, a line of cache
_GELU_BLOCK = 2048
_NORM_BLOCK = 4096
_ROWS = 4  # of pixels that a program of the convolution computes; the kernel writes them out one by one


@triton.jit
def _load_row(pointers, row, row_stride, inside, valid_rows):
    """Row of an image as float32, zeros outside of it."""
    return tl.load(pointers + row * row_stride, mask=inside & (row >= 0) & (row < valid_rows), other=0.0).to(
        tl.float32
    )


@triton.jit
def _store_row(out, kept, features, row, accumulated, bias, kept_bias, offsets, row_stride, stored, rows):
    mask = stored & (row < rows)
    at = offsets + row * row_stride
    tl.store(out + at, (accumulated + bias).to(out.dtype.element_ty), mask=mask)
    center = tl.load(features + at, mask=mask, other=0.0).to(tl.float32)
    tl.store(kept + at, (center + kept_bias).to(kept.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["height", "width", "scale"])
def _depthwise_kernel(
    features, weight, bias, kept_bias, sizes, out, kept, height, width, scale,
    C: tl.constexpr, BLOCK_W: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """Four rows, `BLOCK_W` columns and `BLOCK_C` channels of a 7 x 7 depthwise convolution.

    A row of the input is read seven times, once for each column of the weights, and added to all rows of the output
    that it belongs to.
    """
    blocks_c = (C + BLOCK_C - 1) // BLOCK_C
    block_c = tl.program_id(0) % blocks_c
    tile = tl.program_id(0) // blocks_c
    tiles_w = (width + BLOCK_W - 1) // BLOCK_W
    first_row = (tile // tiles_w) * 4
    columns = (tile % tiles_w) * BLOCK_W + tl.arange(0, BLOCK_W)
    image = tl.program_id(1)
    valid_rows = tl.load(sizes + 2 * image) * scale
    valid_columns = tl.load(sizes + 2 * image + 1) * scale
    channels = block_c * BLOCK_C + tl.arange(0, BLOCK_C)
    has_channel = channels < C
    start = image.to(tl.int64) * height * width * C  # one image has fewer than 2^31 features, a batch may have more
    row_stride = width * C

    sum0 = tl.zeros((BLOCK_W, BLOCK_C), dtype=tl.float32)
    sum1 = tl.zeros((BLOCK_W, BLOCK_C), dtype=tl.float32)
    sum2 = tl.zeros((BLOCK_W, BLOCK_C), dtype=tl.float32)
    sum3 = tl.zeros((BLOCK_W, BLOCK_C), dtype=tl.float32)
    for shift in range(7):
        column = columns + shift - 3
        inside = ((column >= 0) & (column < valid_columns))[:, None] & has_channel[None, :]
        pointers = features + start + (column * C)[:, None] + channels[None, :]
        taps = weight + shift * C + channels
        w0 = tl.load(taps, mask=has_channel, other=0.0)[None, :]
        w1 = tl.load(taps + 7 * C, mask=has_channel, other=0.0)[None, :]
        w2 = tl.load(taps + 14 * C, mask=has_channel, other=0.0)[None, :]
        w3 = tl.load(taps + 21 * C, mask=has_channel, other=0.0)[None, :]
        w4 = tl.load(taps + 28 * C, mask=has_channel, other=0.0)[None, :]
        w5 = tl.load(taps + 35 * C, mask=has_channel, other=0.0)[None, :]
        w6 = tl.load(taps + 42 * C, mask=has_channel, other=0.0)[None, :]
        row = _load_row(pointers, first_row - 3, row_stride, inside, valid_rows)
        sum0 += row * w0
        row = _load_row(pointers, first_row - 2, row_stride, inside, valid_rows)
        sum0 += row * w1
        sum1 += row * w0
        row = _load_row(pointers, first_row - 1, row_stride, inside, valid_rows)
        sum0 += row * w2
        sum1 += row * w1
        sum2 += row * w0
        row = _load_row(pointers, first_row, row_stride, inside, valid_rows)
        sum0 += row * w3
        sum1 += row * w2
        sum2 += row * w1
        sum3 += row * w0
        row = _load_row(pointers, first_row + 1, row_stride, inside, valid_rows)
        sum0 += row * w4
        sum1 += row * w3
        sum2 += row * w2
        sum3 += row * w1
        row = _load_row(pointers, first_row + 2, row_stride, inside, valid_rows)
        sum0 += row * w5
        sum1 += row * w4
        sum2 += row * w3
        sum3 += row * w2
        row = _load_row(pointers, first_row + 3, row_stride, inside, valid_rows)
        sum0 += row * w6
        sum1 += row * w5
        sum2 += row * w4
        sum3 += row * w3
        row = _load_row(pointers, first_row + 4, row_stride, inside, valid_rows)
        sum1 += row * w6
        sum2 += row * w5
        sum3 += row * w4
        row = _load_row(pointers, first_row + 5, row_stride, inside, valid_rows)
        sum2 += row * w6
        sum3 += row * w5
        row = _load_row(pointers, first_row + 6, row_stride, inside, valid_rows)
        sum3 += row * w6

    add = tl.load(bias + channels, mask=has_channel, other=0.0).to(tl.float32)[None, :]
    keep = tl.load(kept_bias + channels, mask=has_channel, other=0.0).to(tl.float32)[None, :]
    stored = (columns < width)[:, None] & has_channel[None, :]
    offsets = start + (columns * C)[:, None] + channels[None, :]
    _store_row(out, kept, features, first_row, sum0, add, keep, offsets, row_stride, stored, height)
    _store_row(out, kept, features, first_row + 1, sum1, add, keep, offsets, row_stride, stored, height)
    _store_row(out, kept, features, first_row + 2, sum2, add, keep, offsets, row_stride, stored, height)
    _store_row(out, kept, features, first_row + 3, sum3, add, keep, offsets, row_stride, stored, height)


@triton.jit(do_not_specialize=["pixels", "width"])
def _norm_kernel(
    features, weight, bias, out, pixels, width, eps,
    C: tl.constexpr, BLOCK_C: tl.constexpr, ROWS: tl.constexpr, PATCHES: tl.constexpr,
):  # fmt: skip
    """Layer norm of `ROWS` pixels; with `PATCHES`, written where the 2 x 2 patch of the pixel has it."""
    pixel = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    channels = tl.arange(0, BLOCK_C)
    mask = (pixel < pixels)[:, None] & (channels < C)[None, :]
    offsets = (pixel * C)[:, None] + channels[None, :]
    values = tl.load(features + offsets, mask=mask, other=0.0).to(tl.float32)
    mean = tl.sum(values, axis=1) / C
    centered = tl.where(mask, values - mean[:, None], 0.0)
    variance = tl.sum(centered * centered, axis=1) / C
    scale = tl.load(weight + channels, mask=channels < C, other=0.0).to(tl.float32)[None, :]
    shift = tl.load(bias + channels, mask=channels < C, other=0.0).to(tl.float32)[None, :]
    result = centered * tl.rsqrt(variance + eps)[:, None] * scale + shift
    if PATCHES:
        # The number of rows of an image is even, so rows of all images can be counted on.
        row = pixel // width
        column = pixel % width
        patch = (row // 2) * (width // 2) + column // 2
        offsets = (patch * (4 * C) + ((row % 2) * 2 + column % 2) * C)[:, None] + channels[None, :]
    tl.store(out + offsets, result.to(out.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["pixels"])
def _gelu_kernel(features, pixels, C: tl.constexpr, BLOCK: tl.constexpr):
    """GELU in place, by Abramowitz and Stegun's 7.1.26: the error function is off by 1.5e-7 at most.

    The exact one takes longer than reading and writing its argument.
    """
    # With the width known, Triton sees that the end is at a multiple of 8 features, and reads and writes 8 at a time.
    end = pixels.to(tl.int64) * C
    offsets = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = offsets < end
    x = tl.load(features + offsets, mask=mask, other=0.0).to(tl.float32)
    z = tl.abs(x) * 0.7071067811865476
    t = 1.0 / (1.0 + 0.3275911 * z)
    polynomial = 1.061405429 * t - 1.453152027
    polynomial = polynomial * t + 1.421413741
    polynomial = polynomial * t - 0.284496736
    polynomial = polynomial * t + 0.254829592
    half_complement = 0.5 * polynomial * t * tl.exp(-z * z)  # half of 1 - erf(z)
    result = x * tl.where(x < 0.0, half_complement, 1.0 - half_complement)
    tl.store(features + offsets, result.to(features.dtype.element_ty), mask=mask)


@functools.cache
def _tuned_depthwise() -> Any:
    configs = [triton.Config({"BLOCK_W": width}, num_warps=warps, num_stages=1) for width, warps in _CONFIGS]
    return triton.autotune(configs, key=["C"])(_depthwise_kernel)


@functools.cache
def _chosen_configs() -> dict[tuple[int, torch.dtype], dict[str, int]]:
    """By number of channels and dtype. Triton's own look-up of them takes longer than a launch."""
    return {}


def depthwise(
    features: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor,
    kept_bias: torch.Tensor,
    sizes: torch.Tensor,
    scale: int,
) -> tuple[torch.Tensor, torch.Tensor]:
    """A 7 x 7 depthwise convolution, and the residual with a bias added.

    Args:
        features: (N, H, W, C).
        weight: (49, C) in float32, row by row of the kernel.
        bias, kept_bias: (C,).
        sizes: (N, 2) in int32, `scale` times which are the rows and columns that each image covers. The convolution
            sees zeros in place of the others.

    Returns:
        The convolution (N, H, W, C), and `features + kept_bias`.
    """
    count, height, width, channels = features.shape
    out, kept = torch.empty_like(features), torch.empty_like(features)
    block_c = min(_MOST_CHANNELS, triton.next_power_of_2(channels))
    rows_and_channels = triton.cdiv(height, _ROWS) * triton.cdiv(channels, block_c)

    def grid(config):
        return triton.cdiv(width, config["BLOCK_W"]) * rows_and_channels, count

    arguments = (features, weight, bias, kept_bias, sizes, out, kept, height, width, scale)
    shapes = {"C": channels, "BLOCK_C": block_c}
    key = (channels, features.dtype)
    config = _chosen_configs().get(key)
    if config is None and features.is_cuda:
        kernel = _tuned_depthwise()
        kernel[grid](*arguments, **shapes)
        _chosen_configs()[key] = kernel.best_config.all_kwargs()
    else:
        config = config or {"BLOCK_W": _CONFIGS[0][0]}  # Triton's interpreter
        _depthwise_kernel[grid(config)](*arguments, **shapes, **config)
    return out, kept


def layer_norm(features: torch.Tensor, norm: torch.nn.LayerNorm) -> torch.Tensor:
    """Over the channels of (..., C), in place."""
    return _norm(features, norm, features, 1, False)


def layer_norm_patches(features: torch.Tensor, norm: torch.nn.LayerNorm) -> torch.Tensor:
    """Over the channels of (N, H, W, C), then the pixels of each 2 x 2 patch in a row: (N, H/2, W/2, 4*C)."""
    count, height, width, channels = features.shape
    out = features.new_empty(count, height // 2, width // 2, 4 * channels)
    return _norm(features, norm, out, width, True)


def _norm(
    features: torch.Tensor, norm: torch.nn.LayerNorm, out: torch.Tensor, width: int, patches: bool
) -> torch.Tensor:
    channels = features.shape[-1]
    pixels = features.numel() // channels
    block = triton.next_power_of_2(channels)
    rows = max(1, _NORM_BLOCK // block)
    _norm_kernel[(triton.cdiv(pixels, rows),)](
        features, norm.weight, norm.bias, out, pixels, width, norm.eps,
        C=channels, BLOCK_C=block, ROWS=rows, PATCHES=patches, num_warps=4,
    )  # fmt: skip
    return out


def gelu_(features: torch.Tensor) -> torch.Tensor:
    """GELU by the error function on (..., C), in place."""
    channels = features.shape[-1]
    grid = (triton.cdiv(features.numel(), _GELU_BLOCK),)
    _gelu_kernel[grid](features, features.numel() // channels, C=channels, BLOCK=_GELU_BLOCK, num_warps=4)
    return features
