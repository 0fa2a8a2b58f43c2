"""Which few shapes images of many native sizes are padded to, and how many pixels that adds."""

from collections.abc import Mapping, Sequence


Size = tuple[int, int]  # height, width in pixels

# How often an image of (height, width) comes in a mix of what users bring: photos of COCO's and of cameras' ratios,
# pages, slides, screens of computers and phones, receipts, icons. Chosen by hand, nobody's statistics.
RAW_IMAGES: dict[Size, int] = {
    (480, 640): 20, (640, 480): 8, (427, 640): 12, (640, 427): 4, (640, 640): 3, (360, 640): 3,
    (3024, 4032): 8, (4032, 3024): 8, (2000, 3000): 4, (1080, 1920): 6, (1440, 2560): 3, (720, 1280): 3,
    (2532, 1170): 5, (3508, 2480): 8, (3300, 2550): 4, (1754, 1240): 3, (900, 1440): 2, (768, 1024): 3,
    (1024, 1024): 3, (2048, 700): 2, (300, 400): 3, (224, 224): 2, (500, 1500): 2, (1500, 2000): 3,
}  # fmt: skip


def holds(bucket: Size, size: Size) -> bool:
    return bucket[0] >= size[0] and bucket[1] >= size[1]


def area(size: Size) -> int:
    return size[0] * size[1]


def make_buckets(counts: Mapping[Size, int], number: int) -> list[Size]:
    """At most `number` shapes of which one holds each size, with few padded pixels.

    The sizes are buckets at first; then the two whose union adds the fewest pixels become one, until few enough are
    left.

    Args:
        counts: how often each size comes.
    """
    buckets = dict(counts)
    while len(buckets) > number:
        _, first, second = min(
            (_added(buckets, first, second), first, second)
            for first in buckets
            for second in buckets
            if first < second
        )
        images = buckets.pop(first) + buckets.pop(second)
        union = _union(first, second)
        buckets[union] = buckets.get(union, 0) + images
    return sorted(buckets)


def _union(first: Size, second: Size) -> Size:
    return max(first[0], second[0]), max(first[1], second[1])


def _added(buckets: Mapping[Size, int], first: Size, second: Size) -> int:
    """Pixels that are added if these two become one; the images in a bucket count as its size."""
    union = area(_union(first, second))
    return sum(buckets[size] * (union - area(size)) for size in (first, second))


def bucket_of(size: Size, buckets: Sequence[Size]) -> Size:
    """The smallest bucket that holds the size.

    Raises:
        ValueError: none does.
    """
    fitting = [bucket for bucket in buckets if holds(bucket, size)]
    if not fitting:
        raise ValueError(f"No bucket of {list(buckets)} holds an image of {size[0]} x {size[1]} pixels.")
    return min(fitting, key=area)


def padding_added(counts: Mapping[Size, int], buckets: Sequence[Size]) -> float:
    """Padded pixels as a share of the images' own."""
    own = sum(count * area(size) for size, count in counts.items())
    padded = sum(count * area(bucket_of(size, buckets)) for size, count in counts.items())
    return padded / own - 1
