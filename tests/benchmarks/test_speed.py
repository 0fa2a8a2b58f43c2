"""The scripts of benchmarks/speed_*.py run: on tiny models, in the processes that they start."""

import json
import sys
from pathlib import Path

import pytest
from helpers import fork_server
from helpers.paths import BENCHMARKS


def run(script: str, results: Path, *options: str) -> dict:
    command = [sys.executable, str(BENCHMARKS / script), "--tiny", "--rounds", "1", "--dtype", "float32"]
    done = fork_server.run([*command, "--device", "cpu", "--results", str(results), *options])
    assert done.returncode == 0, done.stderr[-3000:]
    name = script.removeprefix("speed_").removesuffix(".py")
    assert (results / f"{name}.md").read_text() == done.stdout
    return json.loads((results / f"{name}.json").read_text())


@pytest.mark.slow
def test_growth_is_measured_fitted_and_plotted(tmp_path):
    pytest.importorskip("matplotlib")
    from PIL import Image

    rows = run("speed_growth.py", tmp_path, "--contenders", "CLIP ViT-L/14")["rows"]
    assert [row["task"]["size"][0] for row in rows["measured"]] == [64, 128, 192]
    assert all(row["seconds"] > 0 and row["weights"] > 0 for row in rows["measured"])
    assert rows["fits"][0]["name"] == "CLIP ViT-L/14"
    with Image.open(tmp_path / "growth.png") as plot:
        assert plot.width > 500


@pytest.mark.slow
def test_peers_answer_prompts_with_as_many_visual_tokens_as_they_spend(tmp_path):
    rows = run("speed_answers.py", tmp_path, "--contenders", "ours, eager", "LLaVA-NeXT")["rows"]
    assert {row["name"]: row["visual_tokens"] for row in rows} == {"ours, eager": 4, "LLaVA-NeXT": 2928}
    assert all(row["tokens_per_second"] > 0 for row in rows)


@pytest.mark.slow
def test_a_contender_that_is_not_there_is_refused(tmp_path):
    command = [sys.executable, str(BENCHMARKS / "speed_towers.py"), "--contenders", "nobody", "--results", tmp_path]
    done = fork_server.run(command)
    assert done.returncode == 1 and "There is no contender nobody" in done.stderr
