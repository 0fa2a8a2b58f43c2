"""Peak memory and time of `convert_checkpoint` on a synthetic checkpoint with the shapes of ConvLLaVA-7B.

    python benchmarks/convert_memory.py --layers 32 --shard-size 5GB

Writes the checkpoint (Vicuna-7B's widths, as many layers as asked for, the paper's tower) in shards of float16,
converts it in a process of its own, and compares that process's peak resident memory with the limit: 1.3 times the
largest shard and 2 GiB. Resident memory counts the mapped pages of the input too. Ends with status 1 if the limit is
passed.
"""

import argparse
import json
import platform
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path


GIB = 2**30
HIDDEN, INNER, TOKENS = 4096, 11008, 32000
DEPTHS, WIDTHS = [3, 3, 27, 3, 6], [192, 384, 768, 1536, 3072]
GOLDEN = Path(__file__).parents[1] / "tests" / "golden" / "checkpoint-stage3"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--layers", type=int, default=8, help="of the language model; 32 is the real one (%(default)s)"
    )
    parser.add_argument("--shard-size", default="2GB", help="of the original's files (%(default)s)")
    parser.add_argument("--folder", default=tempfile.gettempdir(), help="where there is room for twice the checkpoint")
    parser.add_argument("--child", nargs="+", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.child:
        return child(*arguments.child)
    rows = []
    with tempfile.TemporaryDirectory(prefix="convert-memory-", dir=arguments.folder) as folder:
        for kind in ("bin", "safetensors"):
            source = Path(folder) / kind
            run_child("make", source, kind, arguments.layers, arguments.shard_size)
            for dtype in ("as it is", "bfloat16"):
                measured = run_child("convert", source, Path(folder) / "out", dtype)
                rows.append(row(source, kind, dtype, measured))
                shutil.rmtree(Path(folder) / "out")
            shutil.rmtree(source)
    return report(rows)


def run_child(*arguments) -> dict:
    """This script in a fresh process, so that memory is its own."""
    command = [sys.executable, __file__, "--child", *map(str, arguments)]
    output = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    return json.loads(output.splitlines()[-1])


def child(job: str, *arguments: str) -> int:
    print(json.dumps(make(*arguments) if job == "make" else convert(*arguments)))
    return 0


def row(source: Path, kind: str, dtype: str, measured: dict) -> dict:
    files = [*source.glob(f"*.{kind}"), source / "vision_tower" / "pytorch_model.bin"]
    sizes = [path.stat().st_size for path in files]
    limit = 1.3 * max(sizes) + 2 * GIB
    return {"kind": kind, "dtype": dtype, "total": sum(sizes), "shard": max(sizes), "limit": limit, **measured}


def report(rows: list[dict]) -> int:
    import safetensors
    import torch
    import transformers

    from convllava_hf.utils.environment import cpu_name

    versions = {"torch": torch, "transformers": transformers, "safetensors": safetensors}
    print(f"{platform.platform()}, {cpu_name()}, Python {platform.python_version()}")
    print(", ".join(f"{name} {module.__version__}" for name, module in versions.items()), end="\n\n")
    print("| original | written dtype | checkpoint | largest shard | limit | peak | time |")
    print("|---|---|---|---|---|---|---|")
    for values in rows:
        sizes = " | ".join(f"{values[key] / GIB:.2f} GiB" for key in ("total", "shard", "limit", "peak"))
        print(f"| {values['kind']} | {values['dtype']} | {sizes} | {values['seconds']:.0f} s |")
    passed = all(values["peak"] < values["limit"] for values in rows)
    print("\nWithin the limit." if passed else "\nOVER THE LIMIT.")
    return 0 if passed else 1


def convert(source: str, output: str, dtype: str) -> dict:
    import time

    from convllava_hf.convert import convert_checkpoint

    start = time.perf_counter()
    convert_checkpoint(source, output, dtype=None if dtype == "as it is" else dtype, progress=False)
    return {"seconds": time.perf_counter() - start, "peak": peak_memory()}


def peak_memory() -> int:
    """Bytes. Linux's ru_maxrss would count the parent's memory at the time of the fork."""
    status = Path("/proc/self/status")
    if status.exists():
        line = next(line for line in status.read_text().splitlines() if line.startswith("VmHWM"))
        return int(line.split()[1]) * 1024
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def make(folder: str, kind: str, layers: str, shard_size: str) -> dict:
    """The checkpoint, as the original code saves it."""
    import torch
    from safetensors.torch import save_file

    from convllava_hf.convert.writing import parse_size

    source = Path(folder)
    (source / "vision_tower").mkdir(parents=True)
    noise = torch.randn(2**22).half()

    def weight(shape: tuple[int, ...]) -> torch.Tensor:
        size = torch.Size(shape).numel()
        return noise.repeat(-(-size // len(noise)))[:size].reshape(shape).clone()  # no spare storage in the file

    shards, size = [{}], 0
    for name, shape in language_model_shapes(int(layers)).items():
        bytes_of = torch.Size(shape).numel() * 2
        if size and size + bytes_of > parse_size(shard_size):
            shards.append({})
            size = 0
        shards[-1][name] = shape
        size += bytes_of
    stem, index = ("pytorch_model", {}) if kind == "bin" else ("model", {})
    for number, shapes in enumerate(shards, 1):
        file = f"{stem}-{number:05d}-of-{len(shards):05d}.{kind}"
        tensors = {name: weight(shape) for name, shape in shapes.items()}
        (torch.save if kind == "bin" else save_file)(tensors, source / file)
        index |= dict.fromkeys(shapes, file)
    (source / f"{stem}.{kind}.index.json").write_text(json.dumps({"metadata": {}, "weight_map": index}))
    tower = {name: weight(shape) for name, shape in tower_shapes().items()}
    torch.save(tower, source / "vision_tower" / "pytorch_model.bin")
    write_configuration(source, int(layers))
    return {"shards": len(shards)}


def language_model_shapes(layers: int) -> dict[str, tuple[int, ...]]:
    shapes = {"model.embed_tokens.weight": (TOKENS, HIDDEN)}
    for layer in range(layers):
        prefix = f"model.layers.{layer}."
        shapes |= {f"{prefix}self_attn.{part}_proj.weight": (HIDDEN, HIDDEN) for part in "qkvo"}
        shapes |= {f"{prefix}mlp.{part}_proj.weight": (INNER, HIDDEN) for part in ("gate", "up")}
        shapes[f"{prefix}mlp.down_proj.weight"] = (HIDDEN, INNER)
        shapes |= {f"{prefix}{norm}_layernorm.weight": (HIDDEN,) for norm in ("input", "post_attention")}
    shapes |= {"model.norm.weight": (HIDDEN,), "lm_head.weight": (TOKENS, HIDDEN)}
    shapes |= {"model.mm_projector.0.weight": (HIDDEN, WIDTHS[-1]), "model.mm_projector.0.bias": (HIDDEN,)}
    return shapes | {"model.mm_projector.2.weight": (HIDDEN, HIDDEN), "model.mm_projector.2.bias": (HIDDEN,)}


def tower_shapes() -> dict[str, tuple[int, ...]]:
    import torch
    from transformers import ConvNextModel

    with torch.device("meta"):
        tower = ConvNextModel(tower_config())
    return {name: tuple(tensor.shape) for name, tensor in tower.state_dict().items()}


def tower_config():
    from transformers import ConvNextConfig

    return ConvNextConfig(depths=DEPTHS, hidden_sizes=WIDTHS, num_stages=len(DEPTHS), image_size=1536)


def write_configuration(source: Path, layers: int) -> None:
    """Configuration and tokenizer files: the golden checkpoint's, in this size."""
    from sentencepiece import sentencepiece_model_pb2

    config = json.loads((GOLDEN / "config.json").read_text())
    config |= {"hidden_size": HIDDEN, "intermediate_size": INNER, "vocab_size": TOKENS, "num_hidden_layers": layers}
    config |= {"num_attention_heads": 32, "num_key_value_heads": 32, "torch_dtype": "float16"}
    (source / "config.json").write_text(json.dumps(config))
    for name in ("generation_config.json", "tokenizer_config.json", "special_tokens_map.json"):
        shutil.copy(GOLDEN / name, source)
    tower_config().save_pretrained(source / "vision_tower")
    preprocessor = json.loads((GOLDEN / "vision_tower" / "preprocessor_config.json").read_text())
    preprocessor |= {"crop_size": {"height": 1536, "width": 1536}, "size": {"shortest_edge": 1536}}
    (source / "vision_tower" / "preprocessor_config.json").write_text(json.dumps(preprocessor))
    proto = sentencepiece_model_pb2.ModelProto()
    proto.ParseFromString((GOLDEN / "tokenizer.model").read_bytes())
    for number in range(len(proto.pieces), TOKENS):
        proto.pieces.add(piece=f"[piece {number}]", score=-float(number), type=1)
    (source / "tokenizer.model").write_bytes(proto.SerializeToString())


if __name__ == "__main__":
    sys.exit(main())
