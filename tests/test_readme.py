"""Nothing in the README may rot: its commands are parsed or run, its Python is run on a converted checkpoint."""

import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from convllava_hf import ConvLlavaConfig, ConvLlavaImageProcessor, cli
from convllava_hf.modeling.configuration_convllava import PRESETS, ImageSizing


ROOT = Path(__file__).parents[1]
PAGES = ("README.md", "CONTRIBUTING.md")


def blocks(page: str, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```$", (ROOT / page).read_text("utf-8"), flags=re.M | re.S)


def command_lines() -> list[list[str]]:
    texts = [block.replace("\\\n", " ") for page in PAGES for block in blocks(page, "bash")]
    return [shlex.split(line, comments=True) for text in texts for line in text.splitlines()]


def commands(program: str) -> list[list[str]]:
    return [arguments for name, *arguments in command_lines() if name == program]


PYTHON = blocks("README.md", "python")


@pytest.mark.parametrize("argv", commands("convllava"), ids=" ".join)
def test_commands_parse(argv):
    args = cli.build_parser().parse_args(argv)
    assert args.command == argv[0]


@pytest.mark.parametrize("argv", commands("make"), ids=" ".join)
def test_make_targets_exist(argv):
    subprocess.run(["make", "--dry-run", *argv], cwd=ROOT, check=True, stdout=subprocess.DEVNULL)


def test_all_commands_are_looked_at():
    ours = {"convllava", "make", "transformers", "pip", "accelerate"}
    assert {line[0] for line in command_lines()} == ours | {"vllm", "python", "lmms-eval"}
    assert [argv[0] for argv in commands("transformers")] == ["serve"]  # tests/test_serve.py runs it
    assert [argv[:2] for argv in commands("python")] == [["-m", "sglang.launch_server"]]
    assert {argv[0] for argv in commands("convllava")} >= {"convert", "ask", "chat", "assemble"}


def test_recipes_named_are_there():
    named = [word for line in command_lines() for word in line if word.startswith("recipes/")]
    assert named and all((ROOT / word).is_file() for word in named)


@pytest.fixture(scope="module")
def converted(golden, tmp_path_factory):
    from convllava_hf.convert import convert_checkpoint

    return convert_checkpoint(
        golden / "checkpoint-stage3", tmp_path_factory.mktemp("readme") / "ConvLLaVA-1536", progress=False
    )


@pytest.mark.slow
@pytest.mark.parametrize("index", range(len(PYTHON)))
def test_python_runs(index, converted, golden):
    """Each block in a process of its own, in a folder where the names that it uses are those of real things."""
    code = PYTHON[index]
    if "BitsAndBytesConfig" in code:
        pytest.importorskip("bitsandbytes")
    if "import evaluate" in code:
        pytest.importorskip("evaluate")
        pytest.importorskip("rapidfuzz")
    image = converted.parent / "photo.jpg"
    image.write_bytes((golden / "images" / "photo.jpg").read_bytes())
    process = subprocess.run(
        [sys.executable, "-c", code], cwd=converted.parent, capture_output=True, text=True, encoding="utf-8"
    )
    assert process.returncode == 0, process.stderr
    if "print(" in code:
        assert process.stdout.strip()


def test_token_table():
    """Each row against the one function that counts visual tokens."""
    rows = re.findall(r"^\| (\d+) x \d+ \| (\d+) \| (\d+) \|$", (ROOT / "README.md").read_text("utf-8"), flags=re.M)
    assert len(rows) == 3
    five = ConvLlavaConfig()
    four = ConvLlavaConfig(vision_config={"depths": [3, 3, 27, 3], "hidden_sizes": [192, 384, 768, 1536]})
    for side, *tokens in rows:
        counted = [config.num_visual_tokens(int(side), int(side)) for config in (five, four)]
        assert counted == [int(number) for number in tokens]


def test_preset_table():
    """Names, bounds and tokens of each preset, and those of the images that the head of the table describes."""
    text = (ROOT / "README.md").read_text("utf-8")
    (head,) = re.findall(r"^\| preset \|.*\|$", text, flags=re.M)
    rows = re.findall(r"^\| `(\w+)` \| (\d+) x (\d+) \| (\d+) \| (.*) \|$", text, flags=re.M)
    shapes = [(2339, 1654) if "A4" in cell else tuple(map(int, re.findall(r"\d+", cell)))[::-1]
              for cell in head.split(" | ")[3:]]  # fmt: skip
    assert (210 * 200 / 25.4, 297 * 200 / 25.4) == pytest.approx((1654, 2339), abs=0.5)
    assert [row[0] for row in rows] == list(PRESETS) and len(shapes) == 4
    for name, height, width, most, counts in rows:
        sizes = ConvLlavaImageProcessor(preset=name).image_sizing()
        assert int(height) * int(width) == sizes.most_pixels
        assert int(most) == sizes.most_tokens
        assert [int(count) for count in counts.split(" | ")] == [sizes.tokens(*shape) for shape in shapes]
        four = ImageSizing("native", 768, 32, None, sizes.most_pixels)
        assert all(3.5 < four.tokens(*shape) / sizes.tokens(*shape) < 5 for shape in shapes)
        assert sizes.least_pixels == 256**2


def test_files_that_the_pages_name_exist():
    for page in PAGES:
        text = (ROOT / page).read_text("utf-8")
        for target in re.findall(r"\]\((?!http)([^)#]+)\)", text):
            assert (ROOT / target).exists(), f"{page} links to {target}"


def test_supported_versions_are_those_of_pyproject_and_ci():
    readme, ci = (ROOT / "README.md").read_text("utf-8"), (ROOT / ".ci" / "run").read_text("utf-8")
    project = (ROOT / "pyproject.toml").read_text("utf-8")
    tested = re.search(r"for version in ([\d. ]+);", ci).group(1).split()
    for version in tested:
        assert version in readme
    assert f"torch from {re.search('torch>=([0-9.]+)', project).group(1)} on" in readme
    assert f"Python {re.search('>=(3[0-9.]+)', project).group(1)} to" in readme
