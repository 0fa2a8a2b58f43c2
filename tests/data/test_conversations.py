"""Records of LLaVA's and the Hub's form become messages and images, and files are read sample by sample."""

import copy
import json
import random

import pytest

from convllava_hf.data import json_reader
from convllava_hf.data.conversations import SampleError, as_parts, count_images, images_of, messages_of, sample_of
from convllava_hf.data.json_reader import BrokenFileError, SampleFile
from convllava_hf.data.paths import ImageFolder, located
from convllava_hf.errors import ConvLlavaError


IMAGE = {"type": "image", "text": None}


def text(value: str) -> dict:
    return {"type": "text", "text": value}


def llava(*turns: str, image=None, first: str = "human", **more) -> dict:
    """A record whose turns alternate."""
    names = ("human", "gpt") if first == "human" else ("gpt", "human")
    record = {"conversations": [{"from": names[i % 2], "value": turn} for i, turn in enumerate(turns)], **more}
    return record if image is None else {**record, "image": image}


def refused(record) -> SampleError:
    with pytest.raises(SampleError) as caught:
        sample_of(record)
    return caught.value


# --- LLaVA's form


def test_images_go_before_the_question_and_its_blanks_are_cut():
    for value in ("<image>\nWhat?", "What?\n<image>", "  What?  <image>  ", "<image>What?"):
        (user, answer) = messages_of(llava(value, " A. "))
        assert user == {"role": "user", "content": [IMAGE, text("What?")]}
        assert answer == {"role": "assistant", "content": [text(" A. ")]}
    # Without an image the text stays as it is.
    assert messages_of(llava("  What? \n", "A"))[0]["content"] == [text("  What? \n")]


def test_several_images_stay_where_the_text_has_them():
    both = messages_of(llava("<image>\n<image>\nWhich?", "A"))[0]["content"]
    assert both == [IMAGE, IMAGE, text("Which?")]
    among = messages_of(llava("First <image> then <image>: which?", "A"))[0]["content"]
    assert among == [text("First "), IMAGE, text(" then "), IMAGE, text(": which?")]


def test_leading_model_turn_is_left_out_and_a_system_message_stays():
    assert messages_of(llava("Hello.", "What?", "A", first="gpt")) == messages_of(llava("What?", "A"))
    record = llava("What?", "A")
    record["conversations"].insert(0, {"from": "system", "value": "Be brief."})
    assert messages_of(record)[0] == {"role": "system", "content": [text("Be brief.")]}
    assert messages_of(record)[1:] == messages_of(llava("What?", "A"))


def test_record_is_not_changed(golden):
    records = json.loads((golden / "conversations.json").read_text())
    before = copy.deepcopy(records)
    for record in records:
        sample_of(sample_of(record))  # its own result is a record of the Hub's form
    assert records == before


@pytest.mark.parametrize(
    ("record", "kind", "says"),
    [
        (None, "malformed", "NoneType"),
        ([], "malformed", "list"),
        ({}, "malformed", "`conversations` is missing"),
        ({"conversations": "text"}, "malformed", "missing or empty"),
        ({"conversations": []}, "malformed", "missing or empty"),
        ({"conversations": [["human", "Hi"]]}, "malformed", "Turn 0"),
        ({"conversations": [{"from": "human", "value": None}]}, "malformed", "Turn 0"),
        (llava("What?"), "malformed", "no question with an answer"),
        (llava("A", first="gpt"), "malformed", "no question with an answer"),
        ({"conversations": [{"from": "human", "value": "a"}, {"from": "bot", "value": "b"}]}, "wrong role", "'bot'"),
        ({"conversations": [{"from": ["human"], "value": "a"}]}, "wrong role", "Turn 0"),
        ({"conversations": [{"from": "human", "value": "a"}] * 2}, "wrong role", "in turn 1; expected the assistant"),
        ({"conversations": [{"from": "gpt", "value": "a"}] * 2}, "wrong role", "in turn 1; expected the user"),
        (llava("What?", "A", "And?", " \n "), "empty answer", "turn 3"),
        (llava("Hi", "What?", "", first="gpt"), "empty answer", "turn 2"),
        (
            llava("<image>\nWhat?", "A"),
            "placeholder mismatch",
            "1 place for an image (<image>), and the sample has 0",
        ),
        (llava("What?", "A", image="a.png"), "placeholder mismatch", "0 places"),
        (llava("<image>\nWhat?", "A", image=["a.png", "b.png"]), "placeholder mismatch", "2 images"),
        (llava("<image>What?", "See <image>", image="a.png"), "placeholder mismatch", "the assistant's text"),
        (llava("<image>What?", "A", image={"file": "a.png"}), "malformed", "`image`"),
        (llava("<image>What?", "A", image=["a.png", 3]), "malformed", "`image`"),
        (llava("<image>What?", "A", image=7), "malformed", "`image` is 7"),
    ],
)
def test_what_cannot_be_trained_on_is_refused_by_kind(record, kind, says):
    error = refused(record)
    assert error.kind == kind
    assert says in str(error)
    assert isinstance(error, ConvLlavaError)


def test_images_of_a_record():
    assert images_of({}) == images_of({"image": None}) == images_of({"image": ""}) == []
    assert images_of({"image": []}) == []
    assert images_of({"image": "a.png"}) == ["a.png"]
    assert images_of({"images": ["a.png", "b.png"], "image": None}) == ["a.png", "b.png"]
    row = {"bytes": b"...", "path": None}
    assert images_of({"image": row}) == images_of({"images": [row]}) == [row]


# --- the Hub's form


def test_parts_of_the_hub_form_are_llavas():
    as_hub = {
        "messages": [
            {"role": "user", "content": [IMAGE, text("What?")]},
            {"role": "assistant", "content": [text("A")]},
        ],
        "images": ["a.png"],
    }
    assert sample_of(as_hub) == sample_of(llava("<image>\nWhat?", "A", image="a.png"))
    # Other fields in parts, as some data sets have them, say nothing.
    as_hub["messages"][0]["content"] = [
        {"type": "image", "index": 0},
        {"type": "text", "text": "What?", "index": None},
    ]
    assert sample_of(as_hub) == sample_of(llava("<image>\nWhat?", "A", image="a.png"))


def test_content_as_text():
    said = [{"role": "user", "content": "What?"}, {"role": "assistant", "content": "A"}]
    assert as_parts(said) == messages_of(llava("What?", "A"))
    # TRL puts images that have no place before the first user's text; `<image>` is a place as in LLaVA.
    assert as_parts(said, images=2)[0]["content"] == [IMAGE, IMAGE, text("What?")]
    placed = [{"role": "user", "content": "What?\n<image>"}, said[1]]
    assert as_parts(placed, images=1) == messages_of(llava("What?\n<image>", "A"))
    assert count_images(as_parts(placed, images=2)) == 1


@pytest.mark.parametrize(
    ("messages", "kind"),
    [
        ([], "malformed"),
        ("Hi", "malformed"),
        (["Hi"], "malformed"),
        ([{"role": "tool", "content": "a"}], "wrong role"),
        ([{"role": "user", "content": [{"type": "video"}]}], "malformed"),
        ([{"role": "user", "content": [{"type": "text", "text": 3}]}], "malformed"),
        ([{"role": "user", "content": "a"}, {"role": "assistant", "content": None}], "empty answer"),
        (
            [{"role": "user", "content": "a"}, {"role": "assistant", "content": [IMAGE, text("b")]}],
            "placeholder mis",
        ),
        ([{"role": "user", "content": [text("<image>a")]}, {"role": "assistant", "content": "b"}], "placeholder mis"),
    ],
)
def test_messages_that_cannot_be_trained_on(messages, kind):
    assert refused({"messages": messages}).kind.startswith(kind)


# --- where images may lie


def test_paths_stay_in_the_folder(tmp_path):
    root, other = tmp_path / "images", tmp_path / "other"
    (root / "sub").mkdir(parents=True)
    other.mkdir()
    (other / "secret.png").write_bytes(b"x")
    (root / "inside.png").symlink_to(root / "sub" / "real.png")
    (root / "link.png").symlink_to(other / "secret.png")
    (root / "linked").symlink_to(other)
    (tmp_path / "alias").symlink_to(root)
    folder = ImageFolder(root)
    for name in ("a.png", "sub/a.png", "sub/../a.png", "inside.png", f"{root}/a.png", "..png", "sub/..a"):
        assert folder.path_of(name) == str(root / name)
        assert ImageFolder(tmp_path / "alias").path_of(name)
    for name in ("../other/secret.png", f"{other}/secret.png", "link.png", "linked/secret.png", "sub/../../images2/a",
                 "", ".", "sub/..", "/etc/passwd", "../imagesX/a.png"):  # fmt: skip
        with pytest.raises(SampleError, match="(is|which is) not inside the image folder") as caught:
            folder.path_of(name)
        assert caught.value.kind == "path escape" and repr(name) in str(caught.value)
    for name in ("http://host/a.png", "a\0b"):
        with pytest.raises(SampleError, match="is not a path"):
            folder.path_of(name)
    with pytest.raises(ConvLlavaError, match="check the path"):
        ImageFolder(tmp_path / "nowhere")


def test_bytes_need_no_folder(tmp_path):
    row = {"bytes": b"x", "path": "name.png"}
    assert located(row, ImageFolder(None)) == row
    for name in ("a.png", "/a.png"):
        with pytest.raises(SampleError, match="name the folder that holds"):
            located({"bytes": None, "path": name}, ImageFolder(None))
    allowed = ImageFolder(None, (tmp_path,))
    assert located({"bytes": None, "path": f"{tmp_path}/a.png"}, allowed)["path"] == f"{tmp_path}/a.png"
    with pytest.raises(SampleError, match="is not inside"):
        located({"bytes": None, "path": "/etc/passwd"}, allowed)


# --- files

NASTY = [
    {"id": "ü", "t": 'quotes " \\ \\u00e9 \\ud83d \U0001f6b2 <image>\n', "n": [1.5e-7, -3, True, None, {}]},
    {},
    {"deep": [[[[{"a": [[]]}]]]], "brackets": "]}],[{", "line separators": "\u2028\u2029\x85\t"},
    {"long": "x" * 5000, "e": "\ud800"},
]


@pytest.mark.parametrize("chunk", [1, 2, 7, 64, 2**20])
@pytest.mark.parametrize("ascii", [True, False])
def test_array_equals_json_load(tmp_path, monkeypatch, chunk, ascii):
    monkeypatch.setattr(json_reader, "CHUNK", chunk)
    samples = NASTY if ascii else NASTY[:-1]  # half a surrogate pair cannot be written as UTF-8
    path = tmp_path / "data.json"
    for indent, blanks in ((None, ""), (3, "\n\r\t " * 50)):
        content = blanks + json.dumps(samples, ensure_ascii=ascii, indent=indent).replace("]}, {", f"]}}{blanks},{{")
        path.write_bytes((content + blanks).encode())
        assert list(SampleFile(path)) == json.loads(path.read_text(encoding="utf-8")) == samples
    path.write_bytes(b"\xef\xbb\xbf [ ] ")
    assert list(SampleFile(path)) == []


@pytest.mark.parametrize("chunk", [1, 13, 2**20])
def test_lines_equal_json_loads(tmp_path, monkeypatch, chunk):
    monkeypatch.setattr(json_reader, "CHUNK", chunk)
    path = tmp_path / "data.json"  # by its content, not by its name
    for end in ("\n", "\r\n", "\n\n \n"):
        path.write_bytes(end.join(json.dumps(sample) for sample in NASTY).encode())
        file = SampleFile(path)
        assert list(file) == list(file) == NASTY
        assert file.position == file.size == path.stat().st_size


def samples_before_the_break(path) -> tuple[list, BrokenFileError]:
    samples = []
    with pytest.raises(BrokenFileError) as caught:
        for sample in SampleFile(path):
            samples.append(sample)
    return samples, caught.value


def test_truncated_file_gives_what_is_whole_and_then_says_where(tmp_path, monkeypatch):
    monkeypatch.setattr(json_reader, "CHUNK", 16)
    path = tmp_path / "data.json"
    pieces = ["[", *(json.dumps(sample, indent=1) + "," for sample in NASTY[:3])]
    content = "\n".join(pieces)
    ends = [len("\n".join(pieces[: count + 1])) - 1 for count in range(1, 4)]  # of each sample, without the comma
    for length in range(len(content)):
        path.write_text(content[:length])
        samples, error = samples_before_the_break(path)
        assert samples == NASTY[: sum(end <= length for end in ends)]
        assert str(path) in str(error)
    assert f"line {content.count(chr(10)) + 1}, column" in str(error)


def test_corrupted_file_is_refused_where_json_load_refuses_it(tmp_path, monkeypatch):
    monkeypatch.setattr(json_reader, "CHUNK", 32)
    path = tmp_path / "data.json"
    content = json.dumps([{"a": [1, "x", None], "b": {"c": "d\n\u00e9"}}] * 4)
    rng = random.Random(0)
    valid = 0
    for _ in range(600):
        position = rng.randrange(len(content))
        path.write_text(content[:position] + rng.choice('x"\\{}[],:1 \n') + content[position + rng.randrange(2) :])
        try:
            expected = json.loads(path.read_text())
        except ValueError:
            samples_before_the_break(path)
        else:
            valid += 1
            assert list(SampleFile(path)) == expected
    assert 50 < valid < 550


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (b"", "empty"),
        (b" \n ", "empty"),
        (b"3", "line 1, column 1: Expected an array"),
        (b'[{"a": 1}, 3]', "line 1, column 12: Expected an object"),
        (b'[{"a": 1} {"b": 2}]', "line 1, column 11: Expected ','"),
        (b'[{"a": 1},\n]', "line 2, column 1: Expected an object"),
        (b'[{"a": 1}]\n\n x', "line 3, column 2: Expected the end"),
        (b'{"a": 1} {"b": 2}\n', "line 1, column 10: Expected one object a line"),
        (b'{"a": 1}\n{"b": x}\n{"c": 3}', "line 2, column 7: Expecting value"),
        (b'[{"a": "\xff"}]', "not UTF-8"),
        ('[{"a": 1}]'.encode("utf-16"), "not UTF-8"),
        (b'[{"a":' + b"[" * 200000, "nested too deep"),
    ],
)
def test_broken_files_say_line_and_column(tmp_path, content, says):
    path = tmp_path / "data.json"
    path.write_bytes(content)
    with pytest.raises(BrokenFileError, match=says.replace("(", r"\(")):
        list(SampleFile(path))


def test_error_in_a_large_file_is_found_without_reading_the_rest(tmp_path, monkeypatch):
    monkeypatch.setattr(json_reader, "CHUNK", 1000)
    path = tmp_path / "data.json"
    path.write_text('[{"a": 1}, {"b": oops},' + '{"c": "' + "x" * 100_000 + '"}]')
    file = SampleFile(path)
    with pytest.raises(BrokenFileError):
        list(file)
    assert file.position < 50_000
    monkeypatch.setattr(json_reader, "LARGEST_SAMPLE", 10_000)
    path.write_text('[{"a": 1}, {"b": "' + "x" * 100_000)
    with pytest.raises(BrokenFileError, match="longer than 10000"):
        list(file)


def test_missing_file():
    with pytest.raises(FileNotFoundError):
        SampleFile("nowhere.json")
