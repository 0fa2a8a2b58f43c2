"""The paper's results, shown next to measured ones: arXiv 2405.15738, table 5, measured there with VLMEvalKit."""

from collections.abc import Mapping
from typing import Any


RESOLUTIONS = (768, 1024, 1536)
REFCOCO = "RefCOCO average"  # over eight splits
# By resolution, in the table's order.
PAPER = {
    "MME": (1541, 1553, 1575),
    "MMBench": (68.0, 68.8, 68.7),
    "SEED": (68.8, 69.3, 70.2),
    "RealWorldQA": (55.9, 58.8, 59.9),
    "MMMU": (36.3, 35.1, 35.8),
    "MMVet": (44.8, 44.4, 45.9),
    "TextVQA": (59.1, 62.5, 65.8),
    "DocVQA": (44.8, 48.5, 59.0),
    "POPE": (87.3, 87.7, 87.3),
    REFCOCO: (80.6, 81.4, 82.3),
}
REFCOCO_SPLITS = (
    ("refcoco", "val"),
    ("refcoco", "testA"),
    ("refcoco", "testB"),
    ("refcoco+", "val"),
    ("refcoco+", "testA"),
    ("refcoco+", "testB"),
    ("refcocog", "val"),
    ("refcocog", "test"),
)


def paper_row(record: Mapping[str, Any]) -> tuple[float, ...] | None:
    """The paper's scores at its three resolutions, if a record is of the same benchmark asked the same way."""
    if record["ocr_tokens"] or record["choice"] == "likelihood":
        return None
    return PAPER.get(record["benchmark"])


def refcoco_average(records: list[Mapping[str, Any]]) -> float | None:
    """The mean over the eight splits, as the paper has it; `None` unless all of them were measured whole."""
    scores = {
        (record["benchmark_name"], record["split"]): record["score"] for record in records if record["limit"] is None
    }
    found = [scores[split] for split in REFCOCO_SPLITS if split in scores]
    return sum(found) / len(found) if len(found) == len(REFCOCO_SPLITS) else None
