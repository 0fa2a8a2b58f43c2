"""How large images come to the tower: properties of every size, figures computed by hand, and Qwen's convention."""

import itertools
import math
import random
from collections.abc import Iterator
from fractions import Fraction

import pytest

from convllava_hf.modeling.configuration_convllava import PRESETS, ImageSizing, visual_token_grid


def shapes(number: int = 400) -> list[tuple[int, int]]:
    """Heights and widths from 1 to 30000 pixels, of every ratio; and those at which something may go wrong."""
    rng = random.Random(0)
    drawn = [tuple(int(math.exp(rng.uniform(0, 10.3))) for _ in range(2)) for _ in range(number)]
    special = [1, 31, 32, 33, 63, 64, 65, 96, 160, 1536, 1537, 20000]
    return drawn + list(itertools.product(special, special))


# Mode, side of the square, stride, least and most pixels.
NATIVE = [
    (768, 64, None, None),
    (1536, 64, None, None),
    (768, 32, 65536, 300_000),
    (128, 64, 4096, 16384),
    (768, 64, 100_000, 2_123_456),  # neither of them whole tokens
    (768, 64, 1, 4096),
    *((768, 64, None, pixels) for pixels in PRESETS.values()),
]


def native(size, stride, least, most) -> ImageSizing:
    return ImageSizing("native", size, stride, least, most)


def keeps_ratio(height: int, width: int, rows: int, columns: int, stride: int) -> bool:
    """Whether at some scale of the image both sides are within half a stride; a side of one stride may be less."""
    lowest, highest = [], []
    for side, tokens in ((height, rows), (width, columns)):
        lowest.append((0 if tokens == 1 else (2 * tokens - 1) * stride, 2 * side))
        highest.append(((2 * tokens + 1) * stride, 2 * side))
    return all(low * b <= high * a for (low, a), (high, b) in itertools.product(lowest, highest))


@pytest.mark.parametrize("values", NATIVE)
def test_sides_are_multiples_the_area_is_within_bounds_and_the_ratio_is_kept(values):
    sizes = native(*values)
    for height, width in shapes():
        seen = sizes.seen(height, width)
        rows, columns = visual_token_grid(*seen, sizes.stride)
        assert sizes.least_pixels <= seen[0] * seen[1] <= sizes.most_pixels, (height, width, seen)
        assert keeps_ratio(height, width, rows, columns, sizes.stride), (height, width, seen)
        assert sizes.tokens(height, width) == rows * columns <= sizes.most_tokens


@pytest.mark.parametrize("values", NATIVE)
def test_no_image_is_enlarged_that_has_enough_pixels(values):
    """But for rounding, which adds half a stride at most, and for sides shorter than one."""
    sizes = native(*values)
    enlarged = 0
    for height, width in shapes():
        seen = sizes.seen(height, width)
        nearest = [max(1, (side + sizes.stride // 2) // sizes.stride) * sizes.stride for side in (height, width)]
        if math.prod(nearest) >= sizes.least_pixels:
            assert all(ours <= own for ours, own in zip(seen, nearest, strict=True)), (height, width, seen)
        else:
            enlarged += seen != tuple(nearest)
    assert enlarged or sizes.least_pixels <= sizes.stride**2


@pytest.mark.parametrize("values", NATIVE)
def test_images_are_scaled_no_further_than_the_bounds_ask(values):
    """Found again by going through all scales at which a side is rounded to another multiple."""
    sizes = native(*values)
    scaled = {"up": 0, "down": 0}
    for height, width in shapes()[::6]:
        tokens = math.prod(rounded(height, width, Fraction(1), sizes.stride, up=True)) * sizes.stride**2
        if sizes.least_pixels <= tokens <= sizes.most_pixels or max(height, width) > 100 * min(height, width):
            continue
        up = tokens < sizes.least_pixels
        bound = sizes.least_pixels if up else sizes.most_pixels
        scale = Fraction(math.sqrt(bound / (height * width)))
        scale = max(scale, Fraction(1)) if up else min(scale, Fraction(1))
        halves = {Fraction((2 * n + 1) * sizes.stride, 2 * side) for side in (height, width) for n in range(400)}
        further = sorted((half for half in halves if (half >= scale if up else half <= scale)), reverse=not up)
        grids = itertools.chain(
            [rounded(height, width, scale, sizes.stride, up=True)],
            (grid for half in further for grid in around(height, width, half, sizes.stride, up)),
        )
        areas = ((math.prod(grid) * sizes.stride**2, grid) for grid in grids)
        first = next(grid for area, grid in areas if (area >= bound if up else area <= bound))
        assert sizes.seen(height, width) == tuple(side * sizes.stride for side in first), (height, width)
        scaled["up" if up else "down"] += 1
    assert scaled["down"] > 0


def around(height: int, width: int, scale: Fraction, stride: int, up: bool) -> Iterator[tuple[int, int]]:
    """The grids at a scale at which a side is in the middle: where both are, the longer one is rounded first."""
    rows, columns = rounded(height, width, scale, stride, up)
    if height > width:
        yield rows, rounded(height, width, scale, stride, not up)[1]
    elif height < width:
        yield rounded(height, width, scale, stride, not up)[0], columns
    yield rows, columns


def rounded(height: int, width: int, scale: Fraction, stride: int, up: bool) -> tuple[int, int]:
    """Rows and columns of an image at that scale, halves rounded up or down."""
    exact = [side * scale / stride for side in (height, width)]
    half = Fraction(1, 2)
    rows, columns = (max(1, math.floor(x + half) if up else math.ceil(x - half)) for x in exact)
    return rows, columns


@pytest.mark.parametrize("mode", ["pad", "native", "shortest_edge"])
def test_an_image_on_its_side_is_seen_on_its_side(mode):
    """Servers count tokens before an image is turned as its Exif data say."""
    sizes = ImageSizing(mode, 768, 64)
    for height, width in shapes():
        assert sizes.seen(width, height) == sizes.seen(height, width)[::-1]


@pytest.mark.parametrize("values", NATIVE)
def test_squares_stay_squares(values):
    sizes = native(*values)
    for side in (1, 31, 64, 100, 767, 5000, 200_000):
        height, width = sizes.seen(side, side)
        assert height == width


@pytest.mark.parametrize("shape", [(448, 640), (64, 3200), (1536, 1536), (192, 12288), (256, 256)])
def test_what_fits_is_seen_as_it_is(shape):
    assert native(1536, 64, None, None).seen(*shape) == shape


@pytest.mark.parametrize(
    "shape, seen",
    [
        # Worked out by hand: at most 576 tokens, at least 16.
        ((2339, 1654), (1792, 1280)),  # A4 at 200 dots an inch: sqrt(576 * 1.414) = 28.5, sqrt(576 / 1.414) = 20.2
        ((1080, 1920), (1088, 1920)),  # 17 x 30 = 510
        ((1000, 3000), (896, 2624)),  # 13.9 and 41.6; 14 x 42 = 588 is too much, and 41.5 comes before 13.5
        ((1, 1), (256, 256)),
        ((7, 5), (320, 256)),  # 4.7 and 3.4; 5 x 3 = 15 is too little
        ((20, 1000), (64, 1024)),
        ((100, 300), (128, 512)),  # 2.3 and 6.9; 2 x 7 is too little, and of 2.5 x 7.5 the longer side is rounded up
        ((100, 100), (256, 256)),
        ((600, 30000), (192, 10880)),  # 3.4 and 169.7
        ((1, 100_000), (64, 36864)),  # 0.06 and 7589: one row of 576
    ],
)
def test_figures_by_hand(shape, seen):
    assert native(1536, 64, None, None).seen(*shape) == seen


@pytest.mark.parametrize(
    "shape, seen",
    [
        ((100, 100), (1536, 1536)),
        ((400, 300), (2048, 1536)),
        ((333, 1000), (1536, 4608)),
        ((8000, 1000), (12288, 1536)),
    ],
)
def test_the_shorter_side_is_fixed(shape, seen):
    assert ImageSizing("shortest_edge", 1536, 64).seen(*shape) == seen


@pytest.mark.parametrize("size, most", [(1536, None), (1664, None), (768, 2_000_000)])
def test_the_shorter_side_is_fixed_up_to_the_bound(size, most):
    sizes = ImageSizing("shortest_edge", size, 64, max_pixels=most)
    reduced = 0
    for height, width in shapes():
        seen = sizes.seen(height, width)
        rows, columns = visual_token_grid(*seen, 64)
        assert math.prod(seen) <= sizes.most_pixels
        assert min(seen) <= size
        if min(seen) < size:
            reduced += 1
            assert size * size * max(height, width) / min(height, width) > sizes.most_pixels - 64 * size
        assert keeps_ratio(height, width, rows, columns, 64)
    assert reduced > 0


def test_where_bounds_are_too_near_each_other_the_upper_one_holds():
    sizes = native(768, 64, 5 * 4096, 6 * 4096)
    for height, width in shapes():
        assert sizes.tokens(height, width) <= 6
    assert sizes.tokens(100, 100) == 4  # 3 x 3 would be too much
    assert sizes.tokens(1000, 1500) == 6


def test_an_image_within_the_bounds_is_seen_as_qwen_sees_it():
    """The convention of `min_pixels` and `max_pixels` is Qwen's; only what has to be scaled is scaled otherwise here,
    since Qwen rounds both sides down, by up to a whole stride each."""
    try:
        from transformers.models.qwen2_vl.image_processing_qwen2_vl import smart_resize
    except ImportError:
        pytest.skip("this transformers needs torchvision for Qwen's function")
    sizes = native(768, 64, 65536, 589824)
    same, ours_kept, theirs_kept = 0, 0, 0
    for height, width in shapes():
        if max(height, width) > 200 * min(height, width) or min(height, width) < 64:
            continue  # refused there
        theirs = smart_resize(height, width, factor=64, min_pixels=65536, max_pixels=589824)
        ours = sizes.seen(height, width)
        near = all(side % 64 != 32 for side in (height, width))  # they round halves to even
        if near and 65536 <= math.prod(max(1, (side + 32) // 64) for side in (height, width)) * 4096 <= 589824:
            assert ours == theirs
            same += 1
        else:
            ours_kept += keeps_ratio(height, width, *visual_token_grid(*ours, 64), 64)
            theirs_kept += keeps_ratio(height, width, *visual_token_grid(*theirs, 64), 64)
    assert same > 20
    assert ours_kept > theirs_kept  # so the check of the ratio can fail


@pytest.mark.parametrize(
    "values, message",
    [
        (("stretch", 768, 64), "image_aspect_ratio is 'stretch', expected one of pad, native, shortest_edge"),
        (("native", 100, 64), "100 x 100.*stride of 64"),
        (("pad", 768, 64, None, 5000), "max_pixels=5000 has no meaning with image_aspect_ratio='pad'.*'native'"),
        (("pad", 768, 64, 5000), "min_pixels=5000 has no meaning"),
        (("shortest_edge", 768, 64, 5000), "min_pixels=5000 has no meaning"),
        (("native", 768, 64, None, 4095), "max_pixels=4095 is less than one visual token.*at least 4096"),
        (("native", 768, 64, 600_000), "min_pixels=600000 is more than max_pixels=589824"),
        (("native", 768, 64, 0), "min_pixels is 0, expected a positive number"),
        (("native", 768, 64, None, 1e6), "max_pixels is 1000000.0, expected"),
        (("native", 768, 64, None, True), "max_pixels is True, expected"),
    ],
)
def test_what_cannot_work_is_refused(values, message):
    with pytest.raises(ValueError, match=message):
        ImageSizing(*values)


@pytest.mark.parametrize("mode", ["native", "shortest_edge"])
def test_an_image_of_no_pixels_is_refused(mode):
    with pytest.raises(ValueError, match="0 x 5 pixels"):
        ImageSizing(mode, 768, 64).seen(0, 5)
