"""The findings' page: its tables, its sentences and its plot."""

import io
import re
import statistics

import pytest
from PIL import Image


pytest.importorskip("matplotlib")

from convllava_hf.miniature.findings_report import findings_text, write_findings  # noqa: E402
from convllava_hf.miniature.language import KINDS  # noqa: E402


def arm(label, values, **more) -> dict:
    runs = [
        {
            "seed": seed,
            "seconds": 100.0 + seed,
            "accuracy": {kind: value - index / 100 for index, kind in enumerate(KINDS)},
        }
        for seed, value in enumerate(values)
    ]
    fixed = {"resolution": 256, "stages": 5, "visual_tokens": 16, "operations_per_image": 5.1e7}
    return {"label": label, **fixed, "runs": runs, **more}


@pytest.fixture
def findings() -> dict:
    return {
        "seeds": [0, 1, 2],
        "scenes": 400,
        "machine": "AMD EPYC, 2 cores",
        "versions": {"torch": "2.13.0"},
        "seconds": 4210.0,
        "arms": {
            "frozen": arm("tower frozen", [0.6, 0.7, 0.5]),
            "updated": arm("tower | updated", [0.9, 0.8, 0.95]),
            "low": arm("four stages", [0.3, 0.4, 0.2], resolution=128, stages=4, operations_per_image=1.24e7),
        },
        "findings": [
            {
                "title": "Updating the tower",
                "question": "Does it help?",
                "arms": ["frozen", "updated"],
                "kinds": ["reading", "count"],
                "paper": {
                    "columns": ["SEED", "DocVQA"],
                    "rows": {"frozen": [65.7, 29.8], "updated": [68.6, 40.2]},
                    "source": "tables 2 and 3",
                },
                "conclusion": "It helps.",
            },
            {
                "title": "All three",
                "question": "Which?",
                "arms": ["frozen", "updated", "low"],
                "kinds": ["grounding"],
                "paper": {"columns": ["SEED"], "rows": {"frozen": [60.0], "updated": [None]}, "source": "table 9"},
                "conclusion": "Not reproduced.",
            },
        ],
    }


def tables_of(text: str) -> list[list[list[str]]]:
    blocks = [block.splitlines() for block in text.split("\n\n") if block.startswith("| ")]
    return [[[cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1]] for line in block] for block in blocks]


def test_findings_as_tables(findings):
    text = findings_text(findings)
    first, second, costs, kinds = tables_of(text)
    assert {len(row) for row in first} == {7} and set("".join(first[1])) == set("-:")
    assert first[0] == ["arm", "px", "tokens", "reading", "count", "paper: SEED", "paper: DocVQA"]
    assert first[2] == ["tower frozen", "256", "16", "0.60 (0.50 to 0.70)", "0.56 (0.46 to 0.66)", "65.7", "29.8"]
    assert first[3][0] == "tower \\| updated" and first[3][3] == "0.88 (0.80 to 0.95)"
    # seed by seed 0.3, 0.1, 0.45: not the difference of the ranges
    assert first[4] == ["difference, by seed", "", "", *["+0.28 (+0.10 to +0.45)"] * 2, "+2.9", "+10.4"]
    assert [row[-1] for row in second[2:]] == ["60.0", "–", "–"]
    assert len(second) == 5  # three arms, and no difference
    assert costs[-1] == ["four stages", "128", "4", "16", "12 M", "1 min 41 s (1 min 40 s to 1 min 42 s)"]
    assert kinds[0] == ["arm", *KINDS]
    measured = [
        [statistics.mean(run["accuracy"][kind] for run in one["runs"]) for kind in KINDS]
        for one in findings["arms"].values()
    ]
    for row, expected in zip(kinds[2:], measured, strict=True):
        assert [float(cell.split()[0]) for cell in row[1:]] == pytest.approx(expected, abs=0.0051)


def test_findings_in_words(findings, tmp_path):
    tmp_path = tmp_path / "new"
    text = write_findings(findings, tmp_path).read_text(encoding="utf-8")
    for part in (
        "## Updating the tower",
        "Does it help?",
        "It helps.",
        "Not reproduced.",
        "tables 2 and 3",
        "table 9",
    ):
        assert part in text
    for part in ("400 unseen scenes", "(0, 1, 2)", "AMD EPYC, 2 cores", "torch 2.13.0", "1 h 10 min", "findings.json"):
        assert part in " ".join(text.split())
    assert "```bash\nconvllava quickstart --findings\n```" in text
    assert max(len(line) for line in text.splitlines() if line[:1] not in "|!") <= 119
    image = Image.open(io.BytesIO((tmp_path / re.search(r"!\[.*\]\((.*)\)", text)[1]).read_bytes()))
    assert image.format == "PNG" and image.width == 1690
    assert {path.name for path in tmp_path.iterdir()} == {"README.md", "findings.png"}


def test_findings_of_runs_that_are_not_all_there(findings):
    findings["arms"]["updated"]["runs"] = findings["arms"]["updated"]["runs"][:1]
    findings["arms"]["low"]["runs"] = []
    first, second, costs, _ = tables_of(findings_text(findings))
    assert first[3][3] == "0.90" and first[4][3] == "+0.30"  # of the one seed that both have
    assert second[-1][3] == "–" and costs[-1][-1] == "–"
