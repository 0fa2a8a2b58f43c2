"""The vision tower in inference by Triton's kernels (`triton_convnext`), perhaps recorded as CUDA graphs."""

import collections
import contextlib
import functools
import threading
from dataclasses import dataclass

import torch
from torch import nn
from transformers.modeling_outputs import BaseModelOutputWithPooling

from ..modeling.configuration_convllava import visual_token_grid
from ..modeling.modeling_convllava import _valid_positions
from .triton_convnext import depthwise, gelu_, layer_norm, layer_norm_patches


_MOST_GRAPHS = 16


@dataclass
class _Product:
    """Weight (in, out) and bias (out,) of a matrix product."""

    weight: torch.Tensor
    bias: torch.Tensor

    def __call__(self, features: torch.Tensor) -> torch.Tensor:
        """(..., in) -> (..., out)"""
        rows = features.view(-1, features.shape[-1])
        return torch.addmm(self.bias, rows, self.weight).view(*features.shape[:-1], -1)


class _Block:
    """A block of a stage on (N, H, W, C)."""

    def __init__(self, layer: nn.Module, is_gelu: bool):
        convolution = layer.dwconv
        self.weight = convolution.weight.float().flatten(1).t().contiguous()  # (C, 1, 7, 7) -> (49, C)
        self.bias = convolution.bias
        self.norm = layer.layernorm
        self.first = _Product(layer.pwconv1.weight.t(), layer.pwconv1.bias)
        self.activation = gelu_ if is_gelu else layer.act
        self.second = _Product(layer.pwconv2.weight.t(), layer.pwconv2.bias)

    def __call__(self, features: torch.Tensor, sizes: torch.Tensor, scale: int) -> torch.Tensor:
        hidden, kept = depthwise(features, self.weight, self.bias, self.second.bias, sizes, scale)
        hidden = self.activation(self.first(layer_norm(hidden, self.norm)))
        # The product is added to the residual, to which the convolution's kernel has added the bias.
        kept.view(-1, kept.shape[-1]).addmm_(hidden.view(-1, hidden.shape[-1]), self.second.weight)
        return kept


class _Stage:
    """Downsampling and blocks: (N, H, W, C) -> (N, H', W', C')."""

    def __init__(self, stage: nn.Module, is_gelu: bool):
        self.norm = self.product = None
        if len(stage.downsampling_layer):
            self.norm, convolution = stage.downsampling_layer
            # Its input are the channels of four pixels, row by row; a view, when the weight is channels-last.
            weight = convolution.weight.permute(0, 2, 3, 1).reshape(convolution.out_channels, -1)
            self.product = _Product(weight.t(), convolution.bias)
        self.blocks = [_Block(layer, is_gelu) for layer in stage.layers]

    def __call__(self, features: torch.Tensor, sizes: torch.Tensor, scale: int) -> torch.Tensor:
        if self.product is not None:
            features = self.product(layer_norm_patches(features, self.norm))
        for block in self.blocks:
            features = block(features, sizes, scale)
        return features


class TritonTower:
    """What a `ConvLlavaVisionTower` computes, without gradients. Its `forward` takes the place of the tower's.

    Args:
        vision_tower: whose convolutions' weights are channels-last, and whose blocks have no layer scale: the second
            product's weights include it.
        with_graphs: each size of a batch is recorded as one launch, in the first call with it.
    """

    def __init__(self, vision_tower: nn.Module, with_graphs: bool = False):
        self.stride = vision_tower.stride
        stem = vision_tower.embeddings.patch_embeddings
        self.patch = stem.kernel_size[0]
        weight = stem.weight.contiguous().flatten(1)  # (C, 3, patch, patch) -> (C, 3*patch*patch)
        self.stem = _Product(weight.t(), stem.bias)
        self.stem_norm = vision_tower.embeddings.layernorm
        is_gelu = vision_tower.config.hidden_act == "gelu"
        self.stages = [_Stage(stage, is_gelu) for stage in vision_tower.encoder.stages]
        self.graphs = _Graphs(self.features) if with_graphs else None
        self.sizes_of = functools.lru_cache(256)(self._sizes_of)

    def forward(
        self, pixel_values: torch.Tensor, image_sizes: torch.Tensor | None = None, **kwargs
    ) -> BaseModelOutputWithPooling:
        """As `ConvLlavaVisionTower.forward`."""
        height, width = pixel_values.shape[-2:]
        grid = visual_token_grid(height, width, self.stride)
        mask = _valid_positions(image_sizes, height, width, self.stride)  # checks the sizes, too
        if mask is None:
            grids = (grid,) * len(pixel_values)
        else:
            rows, columns = mask[:, 0, :, 0].sum(dim=1).int(), mask[:, 0, 0].sum(dim=1).int()
            grids = tuple(zip(rows.tolist(), columns.tolist(), strict=True))
        weight = self.stem.weight
        # Triton launches on the current device. Buffers of graphs must not belong to one caller's inference mode.
        device = torch.cuda.device(weight.device) if weight.is_cuda else contextlib.nullcontext()
        with device, torch.inference_mode(False), torch.no_grad():  # leaving inference mode turns gradients on
            pixels = pixel_values.to(weight.device, weight.dtype)
            features = (self.graphs or self.features)(pixels, self.sizes_of(grids))
        return BaseModelOutputWithPooling(last_hidden_state=features.permute(0, 3, 1, 2))

    def _sizes_of(self, grids: tuple[tuple[int, int], ...]) -> torch.Tensor:
        """Rows and columns of visual tokens of each image, on the device: (N, 2)."""
        return torch.tensor(grids, dtype=torch.int32, device=self.stem.weight.device)

    def features(self, pixels: torch.Tensor, sizes: torch.Tensor) -> torch.Tensor:
        """(N, 3, H, W) -> (N, H/stride, W/stride, C)"""
        count, channels, height, width = pixels.shape
        rows, columns, patch = height // self.patch, width // self.patch, self.patch
        patches = pixels.reshape(count, channels, rows, patch, columns, patch).permute(0, 2, 4, 1, 3, 5)
        features = layer_norm(self.stem(patches.reshape(count, rows, columns, -1)), self.stem_norm)
        for index, stage in enumerate(self.stages):
            features = stage(features, sizes, 2 ** (len(self.stages) - 1 - index))
        return features


@dataclass
class _Graph:
    graph: torch.cuda.CUDAGraph
    pixels: torch.Tensor
    sizes: torch.Tensor
    features: torch.Tensor


class _Graphs:
    """`TritonTower.features`, recorded for each size of a batch; the sizes used last are kept."""

    def __init__(self, compute):
        self.compute = compute
        self.kept: collections.OrderedDict[torch.Size, _Graph] = collections.OrderedDict()
        self.lock = threading.Lock()  # all calls of one size write to the same memory
        self.pool = self.stream = None

    def __call__(self, pixels: torch.Tensor, sizes: torch.Tensor) -> torch.Tensor:
        with self.lock:
            if pixels.shape not in self.kept:
                self.kept[pixels.shape] = self._record(pixels, sizes)
                if len(self.kept) > _MOST_GRAPHS:
                    self.kept.popitem(last=False)
            self.kept.move_to_end(pixels.shape)
            kept = self.kept[pixels.shape]
            kept.pixels.copy_(pixels)
            kept.sizes.copy_(sizes)
            kept.graph.replay()
            return kept.features.clone()

    def _record(self, pixels: torch.Tensor, sizes: torch.Tensor) -> _Graph:
        if self.stream is None:
            self.stream, self.pool = torch.cuda.Stream(), torch.cuda.graph_pool_handle()
        pixels, sizes = pixels.clone(), sizes.clone()
        self.stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self.stream):  # kernels are compiled and tried, libraries take their workspaces
            self.compute(pixels, sizes)
        torch.cuda.current_stream().wait_stream(self.stream)
        graph = torch.cuda.CUDAGraph()
        # Graphs may share memory, because none runs at the same time as another and their results are copied.
        with torch.cuda.graph(graph, pool=self.pool, stream=self.stream, capture_error_mode="thread_local"):
            features = self.compute(pixels, sizes)
        return _Graph(graph, pixels, sizes, features)
