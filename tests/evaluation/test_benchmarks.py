"""Each benchmark over rows in the very columns of its data set: what is said to the model, and what is missing."""

import re

import pytest


pytest.importorskip("datasets")
pytest.importorskip("rapidfuzz")

from helpers import benchmark_data  # noqa: E402
from helpers.benchmark_data import ROWS, make, save  # noqa: E402

from convllava_hf.data.conversations import SampleError  # noqa: E402
from convllava_hf.errors import ConvLlavaError  # noqa: E402
from convllava_hf.evaluation.benchmarks import BENCHMARKS, find_benchmark  # noqa: E402
from convllava_hf.evaluation.samples import MissingValueError  # noqa: E402
from convllava_hf.evaluation.sources import open_source, plan_samples  # noqa: E402


SHORT = "\nAnswer the question using a single word or phrase."
LETTER = "\nAnswer with the option's letter from the given choices directly."
# The first sample of each benchmark: what is said, which answers are right, and with which samples it counts.
FIRST = {
    "textvqa": ("what is written on sign number 0?" + SHORT, tuple(benchmark_data.PEOPLE)),
    "docvqa": ("What is the total of line 0?" + SHORT, ("$ 12.50", "12.50")),
    "infovqa": ("How many people use platform 0?" + SHORT, ("2.5 million",)),
    "chartqa": ("What was the value in 2000?" + SHORT, ("10",)),
    "pope": ("Is there a ring of number 0 in the image?" + SHORT, ("no",)),
    "mme": ("Is there a square of number 0?" + SHORT, ("yes",)),
    "mmbench": ("Which thing is in image 0?\nA. a ring\nB. a square\nC. a star\nD. a disc" + LETTER, ("B",)),
    "seed": ("How many rings are in scene 0?\nA. One\nB. Two\nC. Three\nD. Four" + LETTER, ("A",)),
    "realworldqa": (
        "Where is car 0?\n\nA. Left of us.\nB. Right of us.\nC. Behind us.\n"
        "Please answer directly with only the letter of the correct option and nothing else.",
        ("B",),
    ),
    "scienceqa": (
        "Which property do the objects of image 0 have in common?\nA. soft\nB. yellow\nC. fragile" + LETTER,
        ("A",),
    ),
    "ai2d": ("What does letter 0 stand for?\nA. root\nB. leaf\nC. stem\nD. seed" + LETTER, ("A",)),
    "vqav2": ("What is that thing of number 0?" + SHORT, tuple(benchmark_data.PEOPLE)),
    "gqa": ("Is it overcast in place 0?" + SHORT, ("no",)),
    **{
        name: (
            "Please provide the bounding box coordinate of the region this sentence describes: the left ring of 0.",
            ("the left ring of 0",),
        )
        for name in ("refcoco", "refcoco+", "refcocog")
    },
    "ocrbench": ("what is written in image 0?", ("CENTRE",)),
}


def samples_of(name: str, row: dict, prompt: str | None = None):
    benchmark = BENCHMARKS[name]
    return benchmark.samples_of(row, 0, prompt or benchmark.prompt)


def plan_of(name: str, path, **kwargs):
    benchmark = BENCHMARKS[name]
    return plan_samples(open_source(benchmark, path), benchmark.prompt, **kwargs)


def test_every_benchmark_has_a_made_up_row_and_its_first_question():
    assert set(BENCHMARKS) == set(ROWS) == set(FIRST)


@pytest.mark.parametrize("name", BENCHMARKS)
def test_prompts_and_answers_from_a_local_copy(name, tmp_path):
    path = make(name, tmp_path, samples=4)
    source = open_source(BENCHMARKS[name], path)
    plan = plan_samples(source, BENCHMARKS[name].prompt)
    first = next(iter(plan.samples.values()))
    assert (first.prompt, first.answers) == FIRST[name]
    assert not plan.failures
    image = source.image_of(first)
    assert image["bytes"].startswith(b"\x89PNG")


@pytest.mark.parametrize("name", BENCHMARKS)
def test_missing_columns_are_one_error_before_anything_is_read(name, tmp_path):
    lacking = [*BENCHMARKS[name].columns, "imageId" if name == "gqa" else "image"]
    row = {key: value for key, value in ROWS[name](0).items() if key not in lacking} | {"other": 1}
    with pytest.raises(ConvLlavaError, match=re.escape(f"lacks the columns {', '.join(lacking)}; it has ")):
        open_source(BENCHMARKS[name], save([row], tmp_path / "rows.parquet"))


def test_ocr_tokens_are_a_column_only_where_they_are_asked_for(tmp_path):
    row = {key: value for key, value in ROWS["textvqa"](0).items() if key != "ocr_tokens"}
    path = save([row], tmp_path / "rows.parquet")
    assert open_source(BENCHMARKS["textvqa"], path).rows.num_rows == 1
    with pytest.raises(ConvLlavaError, match="lacks the column ocr_tokens"):
        open_source(BENCHMARKS["textvqa"], path, words=True)


@pytest.mark.parametrize("name", BENCHMARKS)
def test_a_missing_value_is_told_with_its_column(name):
    for column in BENCHMARKS[name].columns:
        if name == "chartqa" and column == "type":
            continue  # only parts of the score are told apart by it
        for nothing in (None, "", []):
            with pytest.raises(MissingValueError, match=f"`{column}`"):
                samples_of(name, {**ROWS[name](1), column: nothing})


def test_choices_that_cannot_be_right_are_missing_values():
    with pytest.raises(MissingValueError, match="number of one of 3 options"):
        samples_of("scienceqa", {**ROWS["scienceqa"](0), "answer": 3})
    with pytest.raises(MissingValueError, match="number of one of 4 options"):
        samples_of("ai2d", {**ROWS["ai2d"](0), "answer": "-1"})
    with pytest.raises(MissingValueError, match="expected one of A, B, C, D"):
        samples_of("seed", {**ROWS["seed"](0), "answer": "E"})
    with pytest.raises(MissingValueError, match="expected yes or no"):
        samples_of("pope", {**ROWS["pope"](0), "answer": "maybe"})
    with pytest.raises(MissingValueError, match="width and height"):
        samples_of("refcoco", {**ROWS["refcoco"](0), "bbox": [1, 2, 0, 4]})


def test_ocr_tokens_are_an_option_of_textvqa_alone():
    benchmark = find_benchmark("TextVQA")
    (sample,) = samples_of("textvqa", ROWS["textvqa"](3), benchmark.prompt_with_words)
    assert sample.prompt == "what is written on sign number 3?\nReference OCR token: EXIT, 3" + SHORT
    with pytest.raises(ConvLlavaError, match="OCRBench has no OCR tokens"):
        find_benchmark("ocrbench").prompt_with_words  # noqa: B018
    with pytest.raises(ConvLlavaError, match="no benchmark 'textvqaa': choose one of textvqa, docvqa"):
        find_benchmark("textvqaa")


def test_hints_stand_before_the_question():
    assert samples_of("mmbench", ROWS["mmbench"](4))[0].prompt.startswith("Look at the middle.\nWhich thing")
    assert samples_of("scienceqa", ROWS["scienceqa"](1))[0].prompt.startswith("Context: Select the best answer.\nWh")


def test_options_that_are_not_there_are_left_out():
    row = {**ROWS["mmbench"](0), "C": "nan", "D": None}
    (sample,) = samples_of("mmbench", row)
    assert sample.choices == ("a ring", "a square")
    with pytest.raises(MissingValueError, match="none behind an empty one"):
        samples_of("mmbench", {**ROWS["mmbench"](0), "C": None})


def test_copies_of_a_question_count_together():
    samples = [samples_of("mmbench", ROWS["mmbench"](index))[0] for index in range(8)]
    assert [sample.group for sample in samples] == ["0"] * 4 + ["1"] * 4
    assert {sample.choices[ord(sample.answers[0]) - ord("A")] for sample in samples} == {"a square"}
    pairs = [samples_of("mme", ROWS["mme"](index))[0].group for index in range(4)]
    assert pairs[0] == pairs[1] != pairs[2] == pairs[3]


def test_videos_are_no_samples_of_seed(tmp_path):
    plan = plan_of("seed", make("seed", tmp_path, samples=10))
    assert list(plan.samples) == ["0", "1", "2", "3", "5", "6", "7", "8"]


def test_real_world_questions_with_and_without_options():
    with_options, without = (
        samples_of("realworldqa", ROWS["realworldqa"](0)),
        samples_of("realworldqa", ROWS["realworldqa"](2)),
    )
    assert with_options[0].choices == ("Left of us.", "Right of us.", "Behind us.")
    assert with_options[0].stem == "Where is car 0?"
    assert without[0].choices == () and without[0].answers == ("3",)


def test_each_sentence_about_an_object_is_a_question(tmp_path):
    plan = plan_of("refcoco", make("refcoco", tmp_path, samples=2))
    assert list(plan.samples) == ["0.0", "0.1", "1.0", "1.1"]
    assert plan.samples["1.1"].prompt.endswith("describes: ring 1.")  # one full stop, whatever the sentence has
    assert plan.samples["0.0"].box == (10.0, 20.0, 40.0, 60.0)


def test_limit_takes_whole_groups(tmp_path):
    path = make("mmbench", tmp_path, samples=12)
    assert list(plan_of("mmbench", path, limit=5).samples) == [str(index) for index in range(8)]
    assert list(plan_of("textvqa", make("textvqa", tmp_path, samples=12), limit=5).samples) == list("01234")


def test_the_checksum_tells_other_questions(tmp_path):
    path = make("pope", tmp_path, samples=6)
    plans = [plan_of("pope", path), plan_of("pope", path), plan_of("pope", path, limit=5)]
    assert plans[0].checksum == plans[1].checksum != plans[2].checksum
    rows = [ROWS["pope"](index) for index in range(6)]
    rows[3]["answer"] = "no"
    assert plan_of("pope", save(rows, tmp_path / "other.parquet")).checksum != plans[0].checksum


# --- where the files lie


def copy_of_the_hub(folder, config: str | None = "DocVQA", name: str = "docvqa"):
    """Two parts of one split and another split, named as the Hub names them."""
    where = folder / (config or "data")
    for part in range(2):
        rows = [ROWS[name](2 * part + index) for index in range(2)]
        save(rows, where / f"validation-0000{part}-of-00002.parquet")
    save([ROWS[name](9)], where / "test-00000-of-00001.parquet")
    return folder


def test_a_copy_of_the_repository_works(tmp_path):
    copy_of_the_hub(tmp_path)
    copy_of_the_hub(tmp_path, "InfographicVQA", "infovqa")
    assert [sample.prompt[:28] for sample in plan_of("docvqa", tmp_path).samples.values()] == [
        f"What is the total of line {index}?" for index in range(4)
    ]
    assert next(iter(plan_of("infovqa", tmp_path).samples.values())).prompt.startswith("How many people")
    other = plan_samples(open_source(BENCHMARKS["docvqa"], tmp_path, split="test"), "{question}")
    assert [sample.prompt for sample in other.samples.values()] == ["What is the total of line 9?"]


def test_splits_and_configurations_that_are_not_there_are_named(tmp_path):
    copy_of_the_hub(tmp_path)
    with pytest.raises(ConvLlavaError, match="no split 'train'; it has test, validation"):
        open_source(BENCHMARKS["docvqa"], tmp_path, split="train")
    copy_of_the_hub(tmp_path, "Other")
    with pytest.raises(ConvLlavaError, match="files in DocVQA, Other, and no folder 'InfographicVQA'"):
        open_source(BENCHMARKS["infovqa"], tmp_path)
    with pytest.raises(ConvLlavaError, match="no data set './nowhere'"):
        open_source(BENCHMARKS["infovqa"], "./nowhere")


def test_an_image_that_is_a_file_must_lie_in_the_folder(tmp_path):
    rows = [ROWS["pope"](index) for index in range(3)]
    benchmark_data.make_image().save(tmp_path / "inside.png")
    for row, path in zip(rows, ("inside.png", "../outside.png", ""), strict=True):
        row["image"] = {"bytes": None, "path": path}
    table = benchmark_data.hf.Dataset.from_list(rows)
    table.to_parquet(tmp_path / "rows.parquet")
    source = open_source(BENCHMARKS["pope"], tmp_path / "rows.parquet")
    samples = list(plan_samples(source, "{question}").samples.values())
    assert source.image_of(samples[0])["path"] == str(tmp_path / "inside.png")
    with pytest.raises(SampleError, match="not inside the image folder"):
        source.image_of(samples[1])
    with pytest.raises(MissingValueError, match="expected an image"):
        source.image_of(samples[2])


def test_a_missing_image_of_a_table_of_images(tmp_path):
    path = make("gqa", tmp_path, samples=4)
    source = open_source(BENCHMARKS["gqa"], path)
    plan = plan_samples(source, "{question}")
    assert source.image_of(plan.samples["3"])["bytes"] == benchmark_data.encoded(0)["bytes"]
    rows = [{**ROWS["gqa"](0), "imageId": "unknown"}]
    save(rows, tmp_path / "testdev_balanced_instructions" / "testdev-00000-of-00001.parquet")
    source = open_source(BENCHMARKS["gqa"], path)
    with pytest.raises(MissingValueError, match="no image 'unknown'"):
        source.image_of(plan_samples(source, "{question}").samples["0"])
