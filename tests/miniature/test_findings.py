"""The paper's findings in miniature: arms that differ in one thing, what follows from them, and runs that go on."""

import json
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file


pytest.importorskip("trl")
pytest.importorskip("sklearn")
pytest.importorskip("matplotlib")

from helpers.miniature_jobs import jobs_in_this_process  # noqa: E402

from convllava_hf.errors import ConvLlavaError  # noqa: E402
from convllava_hf.miniature import quickstart  # noqa: E402
from convllava_hf.miniature.findings import (  # noqa: E402
    ARMS,
    FINDINGS,
    Claim,
    FindingsPlan,
    conclude,
    open_findings,
    run_ablations,
)
from convllava_hf.miniature.findings_report import write_findings  # noqa: E402


TINY = FindingsPlan(
    tower_steps=3, language_steps=3, stage1_scenes=32, stage2_scenes=64, test_scenes=6, seeds=1
)  # fmt: skip


def arms_of(worse: list[float], better: list[float]) -> dict:
    return {
        name: {"runs": [{"seed": seed, "accuracy": {"reading": value}} for seed, value in enumerate(values)]}
        for name, values in (("a", worse), ("b", better))
    }


@pytest.mark.parametrize(
    "worse, better, verdict, spread",
    [
        ([0.5, 0.6, 0.7], [0.6, 0.9, 0.8], ": reproduced, 3 of 3 seeds", "+0.17 in the mean, +0.10 to +0.30"),
        ([0.5, 0.6, 0.7], [0.6, 0.5, 0.8], ": not decided, 2 of 3 seeds", "+0.03 in the mean, -0.10 to +0.10"),
        ([0.5, 0.6], [0.5, 0.3], ": not reproduced, 0 of 2 seeds", "-0.15 in the mean, -0.30 to +0.00"),
    ],
)
def test_a_claim_holds_if_it_does_in_every_seed(worse, better, verdict, spread):
    sentence = conclude(Claim("it helps", "reading", "a", "b"), arms_of(worse, better))
    assert sentence.startswith(f"It helps{verdict}") and spread in sentence


@pytest.mark.parametrize(
    "better, verdict",
    [
        ([0.51, 0.61, 0.4], ": reproduced, 3 of 3 seeds"),
        ([0.52, 0.6, 0.7], ": not decided, 2 of 3 seeds"),
        ([0.6, 0.7, 0.8], ": not reproduced, 0 of 3 seeds"),
    ],
)
def test_that_there_is_no_more_to_gain_is_a_claim_of_its_own(better, verdict):
    claim = Claim("no more", "reading", "a", "b", at_most=0.01)
    assert conclude(claim, arms_of([0.5, 0.6, 0.7], better)).startswith(f"No more{verdict}")


def test_arms_that_are_compared_differ_in_one_thing():
    """In what trains, or in the tower's stages with the resolution that keeps the number of tokens."""
    for finding in FINDINGS:
        assert set(finding.rows) == set(finding.arms)
        for claim in finding.claims:
            assert {claim.worse, claim.better} <= set(finding.arms) and claim.kind in finding.kinds
        arms = [replace(ARMS[name], label="") for name in finding.arms]
        if len({arm.stages for arm in arms}) == 1:
            assert len({replace(arm, trained="") for arm in arms}) == 1
        else:
            assert len({arm.side // 2**arm.stages for arm in arms}) == 1
            assert len({arm.trained.partition("-")[0] for arm in arms}) == 1  # from the same stage on


@pytest.fixture(scope="module", autouse=True)
def jobs_here():
    with jobs_in_this_process():
        yield


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    folder = tmp_path_factory.mktemp("findings") / "run"
    return folder, run_ablations(open_findings(folder, seed=4, plan=TINY))


@pytest.mark.slow
def test_every_arm_trains_what_it_says(tiny):
    folder, findings = tiny
    assert json.loads((folder / "findings.json").read_text()) == json.loads(json.dumps(findings))
    assert findings["seeds"] == [4] and set(findings["arms"]) == set(ARMS)
    for name, told in findings["arms"].items():
        arm = ARMS[name]
        (run,) = told["runs"]
        assert told["visual_tokens"] == 16 and told["resolution"] == arm.side and run["seconds"] > 0
        before = load_file(folder / "seed4" / f"stage1-{arm.stages}" / "model.safetensors")
        after = load_file(folder / "seed4" / name / "model.safetensors")
        stages = [f"vision_tower.encoder.stages.{index}." for index in range(arm.stages)]
        moved = [any(stage in key and not torch.equal(after[key], before[key]) for key in after) for stage in stages]
        first = {"frozen": 4, "from4": 3, "from3": 2, "from2": 1, "four": 2}[name]
        assert moved == [index >= first for index in range(arm.stages)]
    five, four = (findings["arms"][name]["operations_per_image"] for name in ("from3", "four"))
    assert five > 3.9 * four  # four times the pixels, and a stage more


@pytest.mark.slow
def test_findings_are_written_down(tiny, tmp_path):
    _, findings = tiny
    text = write_findings(findings, tmp_path).read_text()
    for finding in FINDINGS:
        assert f"## {finding.title}" in text
    assert (tmp_path / "findings.png").stat().st_size > 10_000


@pytest.mark.slow
def test_interrupted_findings_go_on(tiny, tmp_path, monkeypatch):
    whole, findings = tiny
    update = quickstart.Line.update

    def interrupt(line, done, total, loss=None):
        update(line, done, total, loss)
        if line.title.endswith("from4") and done > 1:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(quickstart.Line, "update", interrupt)
        with pytest.raises(KeyboardInterrupt):
            run_ablations(open_findings(tmp_path / "run", seed=4, plan=TINY))
    with pytest.raises(ConvLlavaError, match="holds a run"):
        open_findings(tmp_path / "run", seed=5, plan=TINY)
    resumed = run_ablations(open_findings(tmp_path / "run", seed=4, plan=TINY))
    for name in ARMS:
        ours, theirs = (found["arms"][name]["runs"][0] for found in (resumed, findings))
        assert ours["accuracy"] == theirs["accuracy"] and ours["losses"] == theirs["losses"]
        paths = (folder / "seed4" / name / "model.safetensors" for folder in (tmp_path / "run", whole))
        ours, theirs = map(load_file, paths)
        assert all(torch.equal(ours[key], theirs[key]) for key in theirs)
