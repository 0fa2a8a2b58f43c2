"""Preprocessing: images a second from JPEG to tensor, in turns.

    python benchmarks/speed_preparing.py

Ours; the original's way (padding in PIL, then transformers' CLIP image processor on PIL); transformers' fast
processors of CLIP, LLaVA-NeXT and Qwen2-VL on torchvision. A photo of 1600 x 1200 and a page of 2480 x 1754 pixels,
on one thread, as in a data loader's worker, and on all. Writes benchmarks/results/speed/preparing.md and .json.
"""

import statistics
import sys
import time

from speed_contest import options, publish

from convllava_hf.profiling.preprocessing import jpeg, open_jpeg
from convllava_hf.profiling.tables import seconds, table


FILES = {"photo": (1600, 1200), "page": (1754, 2480)}
SIDES = (768, 1536)


def main() -> int:
    import torch

    arguments = options(__doc__, rounds=7).parse_args()
    files = {name: jpeg(*([side // 8 for side in size] if arguments.tiny else size)) for name, size in FILES.items()}
    ways = {(name, side): make(side) for side in SIDES for name, make in WAYS.items()}
    rows = []
    for threads in sorted({1, torch.get_num_threads()}):
        torch.set_num_threads(threads)
        for file, data in files.items():
            taken: dict[tuple[str, int], list[float]] = {way: [] for way in ways}
            for number in range(arguments.rounds + 1):
                for way, prepare in ways.items():
                    start = time.perf_counter()
                    prepare(data)
                    if number:  # the first is not counted
                        taken[way].append(time.perf_counter() - start)
            for (name, side), all_seconds in taken.items():
                row = {"name": name, "side": side, "file": file, "size": FILES[file], "threads": threads}
                rows.append({**row, "seconds": statistics.median(all_seconds), "all_seconds": all_seconds})
    columns = [
        ("image processor", lambda row: row["name"]),
        ("resolution", lambda row: str(row["side"])),
        ("JPEG", lambda row: "{} of {} x {}".format(row["file"], *row["size"])),
        ("threads", lambda row: str(row["threads"])),
        ("time", lambda row: seconds(row["seconds"])),
        ("images/s", lambda row: f"{1 / row['seconds']:.1f}"),
    ]
    publish("preparing", "Preprocessing", rows, [table(rows, columns)], arguments)
    return 0


def ours(side: int):
    from convllava_hf import ConvLlavaImageProcessor

    processor = ConvLlavaImageProcessor(size=side)
    return lambda data: processor(open_jpeg(data), return_tensors="pt")


def original(side: int):
    """Padded to a square of the mean color, then CLIP's processor on PIL and NumPy, one image at a time."""
    from PIL import Image
    from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

    size = {"shortest_edge": side}
    processor = CLIPImageProcessorPil(size=size, crop_size={"height": side, "width": side})
    color = tuple(int(255 * channel) for channel in processor.image_mean)

    def prepare(data: bytes):
        image = open_jpeg(data).convert("RGB")
        longest = max(image.size)
        square = Image.new("RGB", (longest, longest), color)
        square.paste(image, ((longest - image.width) // 2, (longest - image.height) // 2))
        return processor(square, return_tensors="pt")

    return prepare


def clip_fast(side: int):
    from transformers import CLIPImageProcessor

    processor = CLIPImageProcessor(size={"shortest_edge": side}, crop_size={"height": side, "width": side})
    return lambda data: processor(open_jpeg(data), return_tensors="pt")


def llava_next_fast(side: int):
    """Tiles of 336 on a grid that covers a square of this side, the whole image beside them."""
    from transformers import LlavaNextImageProcessor

    tiles = -(-side // 336) * 336
    processor = LlavaNextImageProcessor(image_grid_pinpoints=[[tiles, tiles]])
    return lambda data: processor(open_jpeg(data), return_tensors="pt")


def qwen2_vl_fast(side: int):
    """As many pixels as the square has, in the image's own aspect ratio."""
    from transformers import Qwen2VLImageProcessor

    processor = Qwen2VLImageProcessor(size={"shortest_edge": 56 * 56, "longest_edge": side * side})
    return lambda data: processor(open_jpeg(data), return_tensors="pt")


WAYS = {
    "ours": ours,
    "the original's way": original,
    "CLIP, fast": clip_fast,
    "LLaVA-NeXT, fast": llava_next_fast,
    "Qwen2-VL, fast": qwen2_vl_fast,
}


if __name__ == "__main__":
    sys.exit(main())
