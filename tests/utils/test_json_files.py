"""JSON files: objects that must be there, and files that are written whole or not at all."""

import json
import os
from pathlib import Path

import pytest

from convllava_hf.errors import ConvLlavaError
from convllava_hf.utils.json_files import read_json_object, rows_json, write_json, write_json_rows


RESULTS = sorted((Path(__file__).parents[2] / "benchmarks" / "results").rglob("*.json"))


def test_what_is_written_is_read(tmp_path):
    value = {"name": "ä\u3042", "list": [1, None, {"deep": 0.5}]}
    path = write_json(tmp_path / "file.json", value)
    assert read_json_object(path, "It") == value == json.loads(path.read_bytes())
    assert path.read_bytes().endswith(b"}\n") and os.listdir(tmp_path) == ["file.json"]


@pytest.mark.parametrize(
    "content, message",
    [
        (b"{", "is not valid JSON"),
        (b"[1]", "does not hold a JSON object"),
        (b"null", "does not hold a JSON object"),
        (b"\xff\xfe", "is not valid JSON"),
        (b"[" * 200_000, "is not valid JSON"),
    ],
)
def test_other_content_is_refused_by_name(content, message, tmp_path):
    (tmp_path / "config.json").write_bytes(content)
    with pytest.raises(ConvLlavaError, match=f"^The model: .*config.json {message}"):
        read_json_object(tmp_path / "config.json", "The model")


def test_what_is_not_a_file_is_refused(tmp_path):
    with pytest.raises(ConvLlavaError, match="is missing"):
        read_json_object(tmp_path / "config.json", "The model")
    with pytest.raises(ConvLlavaError, match="is not an ordinary file"):
        read_json_object(tmp_path, "The model")


def test_a_value_that_is_not_json_leaves_the_file_as_it_was(tmp_path):
    path = write_json(tmp_path / "file.json", {"a": 1})
    with pytest.raises(TypeError):
        write_json(path, {"a": {1}})
    assert read_json_object(path, "It") == {"a": 1} and os.listdir(tmp_path) == ["file.json"]


@pytest.mark.parametrize(
    "value",
    [
        {},
        [],
        None,
        "é\n",
        {"a": {}, "b": [], "c": [{}], "d": [[1, 2.5], [3, None]], "e": {"f": {"g": [{"h": [1]}, 2]}, "i": ("j",)}},
    ],
)
def test_the_values_are_the_same(value, tmp_path):
    path = write_json_rows(tmp_path / "file.json", value)
    assert json.loads(path.read_text(encoding="utf-8")) == json.loads(json.dumps(value))


def test_a_row_is_a_line():
    value = {
        "seed": 1,
        "accuracy": {"a": 0.5, "b": 1.0},
        "losses": {"one": [[1, 0.5], [2, 0.4]]},
        "rows": [{"a": [1]}, {}],
    }
    assert rows_json(value).splitlines() == [
        "{",
        ' "seed": 1,',
        ' "accuracy": {"a": 0.5, "b": 1.0},',
        ' "losses": {',
        '  "one": [[1, 0.5], [2, 0.4]]',
        " },",
        ' "rows": [',
        '  {"a": [1]},',
        "  {}",
        " ]",
        "}",
    ]


def test_results_in_the_repository_are_written_so():
    assert len(RESULTS) >= 10
    for path in RESULTS:
        text = path.read_text(encoding="utf-8")
        assert rows_json(json.loads(text)) + "\n" == text, path.name
        assert text.count("\n") < 200, path.name
