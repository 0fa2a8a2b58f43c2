"""What `test_triton_tower` runs by Triton's interpreter, on the CPU and in float32.

The interpreter truncates where it should round to bfloat16, so that dtype is checked on a GPU only.
"""

import copy

import torch
from torch import nn
from torch.nn import functional

from convllava_hf import ConvLlavaConfig
from convllava_hf.inference.vision_backends import use_triton
from convllava_hf.modeling.modeling_convllava import ConvLlavaVisionTower
from helpers.tiny_models import randomized


def check_kernels() -> None:
    """Sizes are no multiples of the kernels' blocks, and numbers of channels no powers of two."""
    from convllava_hf.inference.triton_convnext import depthwise, gelu_, layer_norm, layer_norm_patches

    torch.manual_seed(0)
    for channels, height, width in ((24, 6, 10), (80, 5, 3)):
        features = torch.randn(2, height, width, channels)
        kernel, bias, kept_bias = torch.randn(channels, 1, 7, 7), torch.randn(channels), torch.randn(channels)
        masked = features.clone()
        masked[1, 4:] = masked[1, :, 2:] = 0
        expected = functional.conv2d(masked.permute(0, 3, 1, 2), kernel, bias, padding=3, groups=channels)
        sizes = torch.tensor([[height, width], [4, 2]], dtype=torch.int32)
        weight = kernel.flatten(1).t().contiguous()
        found, kept = depthwise(features, weight, bias, kept_bias, sizes, 1)
        torch.testing.assert_close(found, expected.permute(0, 2, 3, 1), rtol=1e-5, atol=1e-4)
        torch.testing.assert_close(kept, features + kept_bias)
        halves = torch.tensor([[height // 2, width // 2], [2, 1]], dtype=torch.int32)
        if height % 2 == width % 2 == 0:
            torch.testing.assert_close(depthwise(features, weight, bias, kept_bias, halves, 2)[0], found)

        norm = randomized(nn.LayerNorm(channels, eps=1e-3))
        expected = norm(features).detach()
        if height % 2 == width % 2 == 0:
            patches = functional.unfold(expected.permute(0, 3, 1, 2), 2, stride=2)  # (N, C*4, patches)
            patches = patches.unflatten(1, (channels, 4)).permute(0, 3, 2, 1)  # (N, patches, 4, C)
            torch.testing.assert_close(layer_norm_patches(features, norm).flatten(1), patches.flatten(1))
        torch.testing.assert_close(layer_norm(features, norm), expected)

    values = torch.linspace(-8, 8, 4 * 24 * 24).view(4, 24, 24)
    torch.testing.assert_close(gelu_(values.clone()), functional.gelu(values), rtol=0, atol=1e-6)


def check_tower() -> None:
    """One size, and two images in a batch: each has the features that it gets without the other."""
    vision = {"depths": [1, 1], "num_stages": 2, "hidden_sizes": [24, 48], "image_size": 32}
    plain = randomized(ConvLlavaVisionTower(ConvLlavaConfig(vision_config=vision).vision_config))
    fast = copy.deepcopy(plain)
    use_triton(fast, with_graphs=False)
    pixels = torch.randn(2, 3, 40, 24)
    assert not fast(pixels[:, :, :8, :8]).last_hidden_state.requires_grad
    with torch.inference_mode():
        expected = plain(pixels).last_hidden_state
        torch.testing.assert_close(fast(pixels).last_hidden_state, expected, rtol=1e-4, atol=1e-4)
        mixed = fast(pixels, image_sizes=[(40, 24), (24, 16)]).last_hidden_state
        one = plain(pixels[1:, :, :24, :16]).last_hidden_state
    torch.testing.assert_close(mixed[:1], expected[:1], rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(mixed[1:, :, :3, :2], one, rtol=1e-4, atol=1e-4)
