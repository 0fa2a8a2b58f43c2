"""What the pages say works: commands are parsed, Python runs on a converted checkpoint, tables are true."""

import pkgutil
import re
import subprocess

import pytest
import transformers
from helpers.pages import PAGES, blocks, command_lines, commands
from helpers.paths import ROOT

from convllava_hf import ConvLlavaConfig, ConvLlavaImageProcessor, cli
from convllava_hf.modeling.configuration_convllava import PRESETS, ImageSizing


# Commands of other programs, which are not run here. "serve" is run by tests/modeling/test_serve.py, `lmms-eval` by
# tests/evaluation/test_lmms_eval_command.py, `trl sft` parsed by tests/training/test_recipes.py.
OTHERS = {"git", "cd", "source", "pip", "hf", "transformers", "vllm", "lmms-eval", "trl"}


PYTHON = {f"{page.name}-{number}": code for page in PAGES for number, code in enumerate(blocks(page, "python"), 1)}


@pytest.mark.parametrize("line", commands("convllava"), ids=" ".join)
def test_our_commands_are_parsed(line):
    args = cli.build_parser().parse_args(line[1:])
    assert args.command == line[1]


@pytest.mark.parametrize("line", commands("make"), ids=" ".join)
def test_make_targets_exist(line):
    subprocess.run([line[0], "--dry-run", *line[1:]], cwd=ROOT, check=True, stdout=subprocess.DEVNULL)


def test_every_command_of_the_command_line_is_on_the_pages():
    named = {line[1] for line in commands("convllava")}
    assert named == {command.__name__.rpartition(".")[2] for command in cli.COMMANDS}


def test_modules_that_are_run_and_files_that_are_named_exist():
    for line in [*commands("accelerate"), *commands("python")]:
        if "-m" in line:
            module = line[line.index("-m") + 1]
            assert module in ("convllava_hf", "convllava_hf.train", "sglang.launch_server", "pytest"), line
            if module == "convllava_hf":
                cli.build_parser().parse_args(line[line.index("-m") + 2 :])
    named = [
        word for line in command_lines() for word in line if re.match(r"(recipes|examples|benchmarks|tests)/", word)
    ]
    assert named and all((ROOT / word).is_file() for word in named), named
    assert {line[0] for line in command_lines()} <= {"convllava", "make", "accelerate", "python"} | OTHERS


@pytest.fixture(scope="module")
def folder(golden, converted_checkpoint, tmp_path_factory):
    """Where the names that the programs use are those of real things."""
    folder = tmp_path_factory.mktemp("pages")
    (folder / "ConvLLaVA-1536").symlink_to(converted_checkpoint("stage3"))
    (folder / "photo.jpg").write_bytes((golden / "images" / "photo.jpg").read_bytes())
    return folder


@pytest.mark.skipif(transformers.__version__.startswith("4."), reason="the programs are written for transformers 5")
@pytest.mark.parametrize("name", PYTHON)
def test_python_runs(name, folder, monkeypatch, capsys):
    code = PYTHON[name]
    needed = {"BitsAndBytesConfig": ["bitsandbytes"], "import evaluate": ["evaluate", "rapidfuzz"], "trl": ["trl"]}
    for word, modules in needed.items():
        if word in code:
            for module in modules:
                pytest.importorskip(module)
    if "PeftModel" in code:
        pytest.skip("tests/training/test_recipes.py runs it, on an adapter")
    monkeypatch.chdir(folder)
    exec(compile(code, name, "exec"), {"__name__": "__main__"})
    assert not re.search(r"^print\(", code, flags=re.M) or capsys.readouterr().out.strip()


def test_token_table():
    """Each row against the one function that counts visual tokens."""
    text = (ROOT / "docs" / "images.md").read_text("utf-8")
    rows = re.findall(r"^\| (\d+) x \d+ \| (\d+) \| (\d+) \|$", text, flags=re.M)
    assert len(rows) == 3
    five = ConvLlavaConfig()
    four = ConvLlavaConfig(vision_config={"depths": [3, 3, 27, 3], "hidden_sizes": [192, 384, 768, 1536]})
    for side, *tokens in rows:
        counted = [config.num_visual_tokens(int(side), int(side)) for config in (five, four)]
        assert counted == [int(number) for number in tokens]


def test_preset_table():
    """Names, bounds and tokens of each preset, and those of the images that the head of the table describes."""
    text = (ROOT / "docs" / "images.md").read_text("utf-8")
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


def test_functions_of_the_walks_exist():
    """CONTRIBUTING's two lists: every dotted name is a function or a class below `convllava_hf`."""
    pytest.importorskip("trl")
    text = (ROOT / "CONTRIBUTING.md").read_text("utf-8")
    walks = text.partition("## From an image to the answer")[2].partition("## Rules for code")[0]
    names = re.findall(r"`([a-z_]+(?:\.\w+)+)`", walks)
    names = [name for name in names if not name.endswith((".json", ".yaml"))]
    assert len(names) > 25
    for name in names:
        assert callable(pkgutil.resolve_name(f"convllava_hf.{name}")), name


def test_links_between_the_pages_lead_somewhere():
    for page in PAGES:
        for target, anchor in re.findall(r"\]\((?!http)([^)#]*)#?([^)]*)\)", page.read_text("utf-8")):
            linked = page.parent / target if target else page
            assert linked.exists(), f"{page} links to {target}"
            if anchor:
                heads = re.findall(r"^#+ (.*)$", linked.read_text("utf-8"), flags=re.M)
                anchors = [re.sub(r"[^\w -]", "", head).lower().replace(" ", "-") for head in heads]
                assert anchor in anchors, f"{page} links to {target}#{anchor}"


def test_supported_versions_are_those_of_pyproject_and_ci():
    readme, ci = (ROOT / "README.md").read_text("utf-8"), (ROOT / ".ci" / "run").read_text("utf-8")
    project = (ROOT / "pyproject.toml").read_text("utf-8")
    tested = re.search(r"for version in ([\d. ]+);", ci).group(1).split()
    for version in tested:
        assert version in readme
    assert f"torch from {re.search('torch>=([0-9.]+)', project).group(1)} on" in readme
    assert f"Python {re.search('>=(3[0-9.]+)', project).group(1)} to" in readme
