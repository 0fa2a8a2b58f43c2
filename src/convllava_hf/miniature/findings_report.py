"""The findings as `README.md` and `findings.png`: what was measured, and what the paper reports."""

import textwrap
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from statistics import mean
from typing import Any

from ..training.plotting import axes_at, figure_style, file_of
from ..utils.atomic import write_atomic
from ..utils.report_style import COLORS, amount, duration, missing, plain, share, versions_text


_ARM_COLORS = (COLORS["chance"], COLORS["accuracy"], COLORS["blind"], "#0369a1", COLORS["right"])
_COMMAND = "convllava quickstart --findings"


def write_findings(findings: Mapping[str, Any], folder: Path) -> Path:
    """Writes `README.md`, the tables, and `findings.png`.

    Args:
        findings: what `findings.json` holds.
        folder: made if it is not there.

    Returns:
        The README.

    Raises:
        ConvLlavaError: matplotlib is not installed; the README is written even then.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    readme = write_atomic(folder / "README.md", findings_text(findings).encode())
    write_atomic(folder / "findings.png", findings_png(findings))
    return readme


def findings_text(findings: Mapping[str, Any]) -> str:
    """The findings as Markdown."""
    arms, seeds = findings["arms"], findings["seeds"]
    titles = " ".join(f"{plain(finding['title'])}." for finding in findings["findings"])
    parts = [
        "# The paper's findings in miniature",
        _wrapped(
            "Small models, trained from nothing in a synthetic world and asked about "
            f"{findings['scenes']} unseen scenes, once for each seed ({', '.join(map(str, seeds))}). The arms of a "
            "finding differ in one thing only and see the same training scenes in the same order. A figure is the "
            "mean over seeds, with the smallest and the largest behind it. The paper's figures are given for their "
            "direction: its models are thousands of times as large and its benchmarks are others, so that no more "
            "than sign and order can agree."
        ),
        f"![{titles} Accuracy by seed beside the paper's benchmarks.](findings.png)",
    ]
    for finding in findings["findings"]:
        parts += [f"## {plain(finding['title'])}", _wrapped(finding["question"]), _finding_table(finding, arms)]
        parts += [_wrapped(f"The paper's figures: {finding['paper']['source']}."), _wrapped(finding["conclusion"])]
    parts += ["## What each arm cost", _cost_table(arms)]
    parts += [
        _wrapped(
            "As many arms ran at the same time as there are cores, on one core each; the time is that of stage 2."
        )
    ]
    parts += ["## Every kind of question", _kinds_table(arms)]
    parts += [
        "## How it was made",
        f"```bash\n{_COMMAND}\n```",
        _wrapped(
            f"It took {duration(findings['seconds'])} on {findings['machine']}, with "
            f"{versions_text(findings['versions'])}. `findings.json` holds every run."
        ),
    ]
    return "\n\n".join(parts) + "\n"


def _finding_table(finding: Mapping, arms: Mapping[str, Mapping]) -> str:
    kinds, paper = finding["kinds"], finding["paper"]
    head = ["arm", "px", "tokens", *kinds, *(f"paper: {column}" for column in paper["columns"])]
    rows = []
    for name in finding["arms"]:
        arm = arms[name]
        measured = [_spread(_of_kind(arm, kind).values(), share) for kind in kinds]
        published = [_published(value) for value in paper["rows"].get(name) or [None] * len(paper["columns"])]
        rows.append([arm["label"], arm["resolution"], arm["visual_tokens"], *measured, *published])
    if len(finding["arms"]) == 2:
        rows.append(_difference_row(finding, arms))
    return _table(head, rows)


def _difference_row(finding: Mapping, arms: Mapping[str, Mapping]) -> list[str]:
    """The second arm less the first, seed by seed: what seeds have in common falls out."""
    first, second = finding["arms"]
    measured = []
    for kind in finding["kinds"]:
        before, after = _of_kind(arms[first], kind), _of_kind(arms[second], kind)
        measured.append(_spread([after[seed] - before[seed] for seed in after if seed in before], _signed))
    rows = finding["paper"]["rows"]
    published = [
        "–" if one is None or other is None else f"{other - one:+.1f}"
        for one, other in zip(rows.get(first) or [], rows.get(second) or [], strict=False)
    ]
    published += ["–"] * (len(finding["paper"]["columns"]) - len(published))
    return ["difference, by seed", "", "", *measured, *published]


def _cost_table(arms: Mapping[str, Mapping]) -> str:
    head = ["arm", "px", "stages", "visual tokens", "tower's operations per image", "time a run"]
    rows = [
        [
            arm["label"],
            arm["resolution"],
            arm["stages"],
            arm["visual_tokens"],
            amount(arm["operations_per_image"]),
            _spread([run["seconds"] for run in arm["runs"] if not missing(run["seconds"])], duration),
        ]
        for arm in arms.values()
    ]
    return _table(head, rows)


def _kinds_table(arms: Mapping[str, Mapping]) -> str:
    kinds = list(dict.fromkeys(kind for arm in arms.values() for run in arm["runs"] for kind in run["accuracy"]))
    rows = [[arm["label"], *(_spread(_of_kind(arm, kind).values(), share) for kind in kinds)] for arm in arms.values()]
    return _table(["arm", *kinds], rows)


def _of_kind(arm: Mapping, kind: str) -> dict[int, float]:
    """Accuracy by seed, of the runs that have one."""
    found = {run["seed"]: run["accuracy"].get(kind) for run in arm["runs"]}
    return {seed: value for seed, value in found.items() if not missing(value)}


def _spread(values, text: Callable[[float], str]) -> str:
    """Mean, smallest and largest."""
    values = list(values)
    if not values:
        return "–"
    if len(values) == 1:
        return text(values[0])
    return f"{text(mean(values))} ({text(min(values))} to {text(max(values))})"


def _signed(value: float) -> str:
    return f"{value:+.2f}"


def _published(value: float | None) -> str:
    return "–" if value is None else f"{value:.1f}"


def _wrapped(text: str) -> str:
    return textwrap.fill(plain(text), 119, break_long_words=False, break_on_hyphens=False)


def _table(head: Sequence[object], rows: Sequence[Sequence[object]]) -> str:
    """A Markdown table: a column of words, the others figures."""
    rule = ["---"] + ["---:"] * (len(head) - 1)
    lines = [[plain(cell).replace("|", "\\|") for cell in row] for row in (head, *rows)]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in (lines[0], rule, *lines[1:]))


def findings_png(findings: Mapping[str, Any]) -> bytes:
    """The figure as a PNG file: a row for each finding, what was measured left and the paper's figures right."""
    found = findings["findings"]
    title, row = 0.9, 2.8  # inches
    height = title + row * len(found)
    note = f"a dot is one seed of {len(findings['seeds'])}, a line their mean; {findings['scenes']} unseen scenes"
    with figure_style() as new_figure:
        figure = new_figure(figsize=(13, height))
        figure.text(
            0.04, 1 - 0.34 / height, "The paper’s findings in miniature", fontsize=20, weight="bold", va="center"
        )
        figure.text(0.04, 1 - 0.77 / height, note, fontsize=9.5, color=COLORS["soft"], va="center")
        for index, finding in enumerate(found):
            top = title + index * row
            figure.text(
                0.04, 1 - (top + 0.25) / height, plain(finding["title"]), fontsize=13, weight="bold", va="center"
            )
            axes = axes_at(figure, 0.52, top + 0.73, 5.72, 1.68), axes_at(figure, 7.15, top + 0.73, 5.46, 1.68)
            _draw_finding(*axes, finding, findings["arms"])
        return file_of(figure)


def _draw_finding(ours: Any, theirs: Any, finding: Mapping, arms: Mapping[str, Mapping]) -> None:
    paper, names = finding["paper"], finding["arms"]
    step = 0.7 / len(names)
    for index, name in enumerate(names):
        offset, color = (index - (len(names) - 1) / 2) * step, _ARM_COLORS[index % len(_ARM_COLORS)]
        for place, kind in enumerate(finding["kinds"]):
            values = list(_of_kind(arms[name], kind).values())
            if values:
                x, middle = place + offset, mean(values)
                apart = [x + (seed - (len(values) - 1) / 2) * step * 0.2 for seed in range(len(values))]
                ours.plot(apart, values, "o", color=color, markersize=6, alpha=0.75, markeredgewidth=0)
                ours.hlines(middle, x - step * 0.36, x + step * 0.36, color=color, linewidth=2.5)
                ours.text(x, max(values) + 0.035, share(middle), ha="center", color=color, fontsize=8.5)
        for place, value in enumerate(paper["rows"].get(name) or []):
            if value is not None:
                theirs.bar(place + offset, value, step * 0.88, color=color)
                theirs.text(place + offset, value + 1.5, _published(value), ha="center", color=color, fontsize=8.5)
        ours.plot([], [], "o-", color=color, label=plain(arms[name]["label"]))
    ours.set_xticks(range(len(finding["kinds"])), finding["kinds"], fontsize=10, color=COLORS["ink"])
    middle, half = (len(finding["kinds"]) - 1) / 2, max(len(finding["kinds"]), 3) / 2 + 0.1
    ours.set(ylim=(0, 1.12), xlim=(middle - half, middle + half), yticks=[0, 0.25, 0.5, 0.75, 1])
    theirs.set_xticks(range(len(paper["columns"])), paper["columns"], fontsize=10, color=COLORS["ink"])
    theirs.set(ylim=(0, 100), xlim=(-0.6, len(paper["columns"]) - 0.4), yticks=[0, 25, 50, 75, 100])
    for axis, title in ((ours, "in miniature: accuracy"), (theirs, f"in the paper: {plain(paper['source'])}")):
        axis.grid(axis="y")
        axis.tick_params(length=0)
        axis.set_title(title, fontsize=9.5, fontweight="normal", color=COLORS["soft"])
    handles, labels = ours.get_legend_handles_labels()
    theirs.legend(handles, labels, loc="center right", bbox_to_anchor=(1.02, 1.28), ncols=len(names))
