"""Whole runs on tiny models: what is asked, what is written, what goes on after an interruption, what fails."""

import functools
import json
import shutil
import threading
import types
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch


pytest.importorskip("datasets")
pytest.importorskip("rapidfuzz")
pytest.importorskip("scipy")

from helpers import benchmark_data  # noqa: E402
from helpers.benchmark_data import ROWS, make, save  # noqa: E402
from helpers.tiny_models import ask, make_image  # noqa: E402

from convllava_hf import cli  # noqa: E402
from convllava_hf.errors import ConvLlavaError  # noqa: E402
from convllava_hf.evaluation import runner  # noqa: E402
from convllava_hf.evaluation.benchmarks import BENCHMARKS  # noqa: E402
from convllava_hf.evaluation.engine import Reply, continuation_ids, score_options  # noqa: E402
from convllava_hf.evaluation.metrics import textvqa_accuracy  # noqa: E402
from convllava_hf.evaluation.prediction_log import PredictionLog, merge_shards, read_rows  # noqa: E402
from convllava_hf.evaluation.predictor import Predictor  # noqa: E402
from convllava_hf.evaluation.run_settings import Model, Settings  # noqa: E402
from convllava_hf.evaluation.runner import evaluate  # noqa: E402
from convllava_hf.evaluation.samples import Sample  # noqa: E402
from convllava_hf.evaluation.scorers import ImageGeometry  # noqa: E402
from convllava_hf.evaluation.sources import open_source, plan_samples  # noqa: E402
from convllava_hf.inference import load, prompt_inputs  # noqa: E402
from convllava_hf.publish.results import read_results, table_rows  # noqa: E402


@pytest.fixture(scope="module")
def assistant(checkpoint):
    return load(checkpoint, device="cpu", dtype="float32")


@pytest.fixture
def run(checkpoint, assistant, tmp_path):
    """A function: runs a benchmark by its name on a data set, and returns its folder, record and rows by id."""

    def evaluated(name: str, path, output: str = "out", **settings):
        model = Model(str(checkpoint), lambda: assistant, torch.float32)
        folder, record, _ = evaluate(
            BENCHMARKS[name], model, assistant.processor, tmp_path / output, path, Settings(**settings)
        )
        return folder, record, rows_of(folder)

    return evaluated


def rows_of(folder) -> dict[str, dict]:
    lines = (folder / "samples.jsonl").read_text(encoding="utf-8").split("\n")[:-1]
    rows = [json.loads(line) for line in lines]
    assert len({row["id"] for row in rows}) == len(rows)
    return {row["id"]: row for row in rows}


@pytest.fixture
def scripted(monkeypatch):
    """A function: makes the model answer what it is told, by sample."""

    def script(answer) -> list[str]:
        asked = []

        def ask(self, batch):
            asked.extend(sample.id for sample in batch.samples)
            return [Reply(answer(sample), 10, 4, [2]) for sample in batch.samples]

        monkeypatch.setattr(Predictor, "predict", ask)
        return asked

    return script


# --- the answers


def test_predictions_are_those_of_single_questions(run, assistant, tmp_path):
    """Batched, padded and sorted, against transformers' own calls one by one."""
    path = make("textvqa", tmp_path / "data", samples=5)
    _, record, rows = run("textvqa", path, batch_size=3)
    for index in range(5):
        prompt = ROWS["textvqa"](index)["question"] + "\nAnswer the question using a single word or phrase."
        inputs = assistant.processor.apply_chat_template(
            ask(prompt, make_image(100, 60, index)),
            add_generation_prompt=True,
            tokenize=True,
            return_dict=True,
            return_tensors="pt",
        )
        output = assistant.model.generate(**inputs, max_new_tokens=32, do_sample=False)
        new = output[0, inputs["input_ids"].shape[1] :]
        row = rows[str(index)]
        assert row["prediction"] == assistant.processor.decode(new, skip_special_tokens=True).strip()
        assert row["prompt_tokens"] == inputs["input_ids"].shape[1] and row["new_tokens"] == len(new)
        assert row["score"] == textvqa_accuracy(row["prediction"], benchmark_data.PEOPLE)
    assert len({row["prediction"] for row in rows.values()}) > 1  # images and questions matter
    assert list(rows) == ["0", "1", "2", "3", "4"]


def test_likelihoods_are_those_of_whole_conversations(run, assistant, tmp_path):
    """Prompts once and options on their cache, against each whole conversation by itself, without a cache."""
    path = make("scienceqa", tmp_path / "data", samples=3)
    _, record, rows = run("scienceqa", path, choice="likelihood")
    processor = assistant.processor
    assert record["setting"].startswith("128 px, by the options' likelihoods")
    for index in range(3):
        row = ROWS["scienceqa"](index)
        hint = f"Context: {row['hint']}\n" if row["hint"] else ""
        question = ask(hint + row["question"], make_image(100, 60, index))
        expected = []
        for choice in row["choices"]:
            answer = {"role": "assistant", "content": [{"type": "text", "text": choice}]}
            inputs = processor.apply_chat_template(
                [*question, answer], tokenize=True, return_dict=True, return_tensors="pt"
            )
            prompt = prompt_inputs(processor, [question])["input_ids"].shape[1]
            ids = inputs["input_ids"][0]
            assert ids[-1] == processor.tokenizer.eos_token_id
            logits = assistant.model(**inputs).logits[0].log_softmax(-1)
            places = range(prompt, len(ids))
            expected.append(sum(float(logits[place - 1, ids[place]]) for place in places) / len(places))
        found = rows[str(index)]
        assert found["log_likelihoods"] == pytest.approx(expected, abs=1e-3)
        best = max(range(3), key=expected.__getitem__)
        assert found["read"] == "ABC"[best] and found["prediction"] == row["choices"][best]
        assert found["score"] == float(best == row["answer"])


def test_options_of_different_number_and_length_in_a_batch(assistant):
    inputs = prompt_inputs(assistant.processor, [ask("One?", make_image(seed=1)), ask("Which of two?", make_image())])
    options = [[[70], [71, 72, 73]], [[74, 75], [76], [77, 78, 79, 80]]]
    together = score_options(assistant, inputs, options)
    assert [len(reply.likelihoods) for reply in together] == [2, 3]
    alone = prompt_inputs(assistant.processor, [ask("Which of two?", make_image())])
    (expected,) = score_options(assistant, alone, options[1:])
    values = [[one.log_likelihood for one in reply.likelihoods] for reply in (together[1], expected)]
    assert values[0] == pytest.approx(values[1], abs=1e-4)


def test_an_answer_that_shares_a_token_with_its_prompt_is_tokenized_by_itself():
    class Merging:
        """Knows `: yes` as one token."""

        def __call__(self, text, add_special_tokens):
            ids, rest = [], text
            while rest:
                if rest.startswith(": yes"):
                    ids, rest = [*ids, 1000], rest[5:]
                else:
                    ids, rest = [*ids, ord(rest[0])], rest[1:]
            return {"input_ids": ids}

    assert continuation_ids(Merging(), "Q:", "Q: yes") == [ord(character) for character in " yes"]
    assert continuation_ids(Merging(), "Q:", "Q: no") == [ord(character) for character in " no"]


# --- what is right


def letter_of(sample: Sample) -> str:
    return sample.answers[0]


def test_right_answers_score_in_full(run, scripted, tmp_path):
    """Every benchmark whose right answer is a text, answered by it."""
    full = {"textvqa": 100, "vqav2": 100, "mme": 400}  # two of MME's perception categories
    scripted(lambda sample: "sign" if len(sample.answers) == 10 else sample.answers[0])
    for name in set(BENCHMARKS) - {"refcoco", "refcoco+", "refcocog"}:
        _, record, _ = run(name, make(name, tmp_path / name, samples=6))
        assert record["score"] == full.get(name, 100), name
        assert record["failures"] == 0 and record["counts"]["scored"] == record["samples"]


def test_boxes_of_the_padded_square_score_in_full(run, scripted, tmp_path):
    scripted(lambda sample: "[0.30, 0.20, 0.60, 0.60]")  # of 60 x 100 pixels in 100 x 100: 10 to 40, 20 to 60
    for name in ("refcoco", "refcoco+", "refcocog"):
        _, record, rows = run(name, make(name, tmp_path / name, samples=3))
        assert record["score"] == 100
        assert rows["0.0"]["read"] == pytest.approx([10 / 60, 0.2, 40 / 60, 0.6])


def test_one_wrong_copy_makes_a_question_of_mmbench_wrong(run, scripted, tmp_path):
    scripted(lambda sample: "A" if sample.id == "2" else sample.answers[0])
    _, record, _ = run("mmbench", make("mmbench", tmp_path / "data", samples=12))
    assert record["score"] == pytest.approx(200 / 3, abs=1e-3)
    assert record["scores"]["accuracy of single questions"] == pytest.approx(1100 / 12, abs=1e-3)
    assert record["counts"]["scored_groups"] == 3


# --- the record


def test_the_record_says_what_was_measured(run, scripted, tmp_path, assistant):
    scripted(lambda sample: "sign" if int(sample.id) % 2 else "board")
    path = make("textvqa", tmp_path / "data", samples=10)
    folder, record, rows = run("textvqa", path, limit=8, ocr_tokens=True, image_options={"size": 64})
    right, wrong = (textvqa_accuracy(word, benchmark_data.PEOPLE) for word in ("sign", "board"))
    assert record["score"] == pytest.approx(100 * (right + wrong) / 2, abs=1e-3)
    assert record["interval"][0] < record["score"] < record["interval"][1]
    told = json.loads((folder / "record.json").read_text())
    assert told == record
    assert told["setting"] == "64 px, with OCR tokens, the first 8 samples"
    assert told["images"] == {
        "mode": "pad",
        "size": 64,
        "min_pixels": None,
        "max_pixels": None,
        "most_tokens": 1,
    }
    _, record, rows = run(
        "textvqa", path, limit=8, image_options={"image_aspect_ratio": "native", "max_pixels": 128**2}
    )
    assert record["setting"].startswith("images in their own shape, up to 16384 px")
    assert record["images"]["most_tokens"] == 4 and {row["visual_tokens"] for row in rows.values()} <= {1, 2, 3, 4}
    assert told["visual_tokens"] == 4  # as the scripted model told
    assert (told["samples"], told["failures"], told["dtype"], told["ocr_tokens"]) == (8, 0, "float32", True)
    assert (told["device"], told["processes"], told["batch_size"]) == ("cpu", 1, 8)
    assert "\nReference OCR token: EXIT, 0\n" in told["example_prompt"]
    assert (
        told["example_prompt"].startswith("<s>A chat between a curious user") and "<image>" in told["example_prompt"]
    )
    assert torch.__version__.startswith(told["versions"]["torch"].partition("+")[0])
    assert told["seconds"] >= 0 and set(told["model"]) == {"name", "commit", "files"}
    assert str(tmp_path) not in json.dumps(told)  # nothing about this machine
    assert all(row["seconds"] >= 0 for row in rows.values())


def test_the_model_card_reads_the_record(run, scripted, tmp_path):
    scripted(letter_of)
    folder, record, _ = run("mmbench", make("mmbench", tmp_path / "data", samples=8))
    (result,) = read_results(folder / "record.json")
    assert (result.benchmark, result.metric, result.score) == ("MMBench", "accuracy", 100.0)
    assert (result.split, result.config, result.samples, result.failures) == ("dev", "en", 8, 0)
    row = next(row for row in table_rows([result]) if row["benchmark"] == "MMBench")
    assert row["score"] == "100 (100 to 100)" and "CircularEval" in row["details"]


# --- going on


def test_a_run_goes_on_where_it_was_interrupted(run, scripted, tmp_path, monkeypatch):
    path = make("pope", tmp_path / "data", samples=10)
    asked = scripted(letter_of)
    kept, append = [], runner.PredictionLog.append

    def interrupted(self, rows):
        append(self, rows)
        kept.append(rows)
        if len(kept) == 4:  # the first is that of rows which failed
            raise KeyboardInterrupt

    monkeypatch.setattr(runner.PredictionLog, "append", interrupted)
    with pytest.raises(KeyboardInterrupt):
        run("pope", path, batch_size=2)
    monkeypatch.setattr(runner.PredictionLog, "append", append)
    before = list(asked)
    assert len(before) == 6
    folder = tmp_path / "out" / "pope"
    assert not (folder / "record.json").exists()
    with open(next(folder.glob("*.part.jsonl")), "ab") as file:
        file.write(b'{"id": "9", "score": 1.0, "predic')  # what a kill in the midst of writing leaves
    _, record, rows = run("pope", path, batch_size=2)
    after = asked[len(before) :]
    assert sorted(before + after, key=int) == [str(index) for index in range(10)]
    assert record["samples"] == 10 and list(rows) == [str(index) for index in range(10)]
    assert [path.name for path in sorted(folder.iterdir())] == ["record.json", "run.json", "samples.jsonl"]


def test_rows_of_several_killed_processes_become_one_file(tmp_path):
    for process, names in enumerate((["3", "0"], ["2"])):
        with PredictionLog(tmp_path, process) as prediction_log:
            prediction_log.append({"id": name, "score": 1.0, "prediction": "\ud800 \u2028"} for name in names)
    with open(tmp_path / "samples.00001.part.jsonl", "ab") as file:
        file.write(b'{"id": "4"')
    assert list(read_rows(tmp_path, parts=False)) == []
    assert list(merge_shards(tmp_path, ["0", "1", "2", "3"])) == ["0", "2", "3"]
    assert [path.name for path in tmp_path.iterdir()] == ["samples.jsonl"]
    assert list(read_rows(tmp_path)) == ["0", "2", "3"]
    shutil.copy(tmp_path / "samples.jsonl", tmp_path / "samples.00000.part.jsonl")  # a kill before it was removed
    assert list(merge_shards(tmp_path)) == ["0", "2", "3"]


def test_processes_that_do_not_find_together_are_refused(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setattr(runner, "PartialState", lambda **kwargs: types.SimpleNamespace(num_processes=1))
    with pytest.raises(ConvLlavaError, match="2 processes were started, and 1 of them"):
        runner.join_processes("cpu")


def test_a_finished_run_is_scored_again_without_a_model(checkpoint, assistant, scripted, run, tmp_path):
    path = make("pope", tmp_path / "data", samples=6)
    scripted(letter_of)
    _, record, rows = run("pope", path)
    model = Model(str(checkpoint), functools.partial(pytest.fail, "the model was loaded"), torch.float32)
    folder, again, _ = evaluate(BENCHMARKS["pope"], model, assistant.processor, tmp_path / "out", path, Settings())
    for told in (record, again):
        told.pop("date")
    assert again == record and rows_of(folder) == rows


def test_another_run_in_the_same_folder_is_refused(run, scripted, tmp_path, checkpoint, assistant):
    scripted(letter_of)
    path = make("pope", tmp_path / "data", samples=6)
    folder, *_ = run("pope", path)
    rows = [ROWS["pope"](index) for index in range(7)]
    with pytest.raises(ConvLlavaError, match="differs in questions: questions was"):
        run("pope", save(rows, tmp_path / "data" / "pope.parquet"))
    other = tmp_path / "other"
    shutil.copytree(checkpoint, other)
    model = Model(str(other), lambda: assistant, torch.bfloat16)
    with pytest.raises(ConvLlavaError, match="differs in questions, model, dtype"):
        evaluate(BENCHMARKS["pope"], model, assistant.processor, tmp_path / "out", path)
    _, record, _ = evaluate(
        BENCHMARKS["pope"], model, assistant.processor, tmp_path / "out", path, overwrite=True, progress=False
    )
    assert record["samples"] == 7
    (tmp_path / "out" / "ai2d").mkdir()
    (tmp_path / "out" / "ai2d" / ".run.json.0a1b.partial").write_text("{")  # a kill at the very beginning
    assert run("ai2d", make("ai2d", tmp_path / "data"))[1]["score"] == 100
    (tmp_path / "out" / "mme").mkdir()
    (tmp_path / "out" / "mme" / "mine.txt").write_text("no run")
    for overwrite in (False, True):
        with pytest.raises(ConvLlavaError, match="is not empty and (no|not a) run"):
            evaluate(
                BENCHMARKS["mme"],
                model,
                assistant.processor,
                tmp_path / "out",
                make("mme", tmp_path / "data"),
                overwrite=overwrite,
            )


def test_a_broken_line_among_the_samples_is_told(run, scripted, tmp_path):
    scripted(letter_of)
    path = make("pope", tmp_path / "data", samples=4)
    folder, *_ = run("pope", path)
    lines = (folder / "samples.jsonl").read_text().splitlines(keepends=True)
    (folder / "samples.jsonl").write_text(lines[0] + "{broken\n" + lines[1])
    with pytest.raises(ConvLlavaError, match="samples.jsonl, line 2, is no row"):
        run("pope", path)


# --- failures


def broken_images() -> list[dict | None]:
    whole = benchmark_data.encoded(1)["bytes"]
    return [
        benchmark_data.encoded(0),
        {"bytes": whole[: len(whole) // 2], "path": "cut.png"},
        {"bytes": b"no image", "path": "text.png"},
        {"bytes": b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\nshowpage\n", "path": "drawing.jpg"},
        None,
        benchmark_data.encoded(5),
    ]


def test_broken_images_are_counted_apart(run, tmp_path):
    """With a real model: what can be asked is asked, and nothing else is in the score."""
    rows = [{**ROWS["docvqa"](index), "image": image} for index, image in enumerate(broken_images())]
    path = save(rows, tmp_path / "rows.parquet")
    _, record, written = run("docvqa", path, batch_size=6)
    assert record["samples"] == 6 and record["failures"] == 4
    assert record["counts"]["failures"] == {"image": 3, "missing value": 1}
    assert record["counts"]["scored"] == record["counts"]["answered"] == 2
    assert [name for name, row in written.items() if "failure" in row] == ["1", "2", "3", "4"]
    assert "cut.png" in written["1"]["failure"]["message"] and "text.png" in written["2"]["failure"]["message"]
    assert all("score" not in row for row in written.values() if "failure" in row)
    _, alone, good = run("docvqa", save([rows[0], rows[5]], tmp_path / "good.parquet"), output="good")
    assert alone["score"] == record["score"] and good["0"]["prediction"] == written["0"]["prediction"]
    assert good["1"]["prediction"] == written["5"]["prediction"]


def test_failures_do_not_lower_a_score(run, scripted, tmp_path):
    """Half of a pair that failed takes the other half out of MME's score, and no more."""
    scripted(letter_of)
    rows = [ROWS["mme"](index) for index in range(12)]
    rows[1]["image"] = {"bytes": b"broken", "path": "1.png"}
    rows[4]["question"] = None
    folder, record, written = run("mme", save(rows, tmp_path / "rows.parquet"))
    assert record["score"] == 400  # existence and OCR, in full
    assert record["failures"] == 2 and record["counts"]["left_out"] == 2
    assert [name for name, row in written.items() if row.get("left_out")] == ["0", "5"]
    assert record["counts"]["scored"] == 8


def test_prompts_that_are_too_long_fail_alone(run, tmp_path):
    rows = [ROWS["textvqa"](index) for index in range(4)]
    rows[2]["question"] = "what is written here? " * 200
    _, record, written = run("textvqa", save(rows, tmp_path / "rows.parquet"), batch_size=4)
    assert record["counts"]["failures"] == {"too long": 1}
    assert "and 32 are kept for the answer; the model's context holds 512" in written["2"]["failure"]["message"]


def test_answers_that_the_metric_cannot_use_fail(run, scripted, tmp_path):
    rows = [{**ROWS["textvqa"](index), "answers": ["sign"] if index else benchmark_data.PEOPLE} for index in range(3)]
    scripted(lambda sample: "sign")
    _, record, _ = run("textvqa", save(rows, tmp_path / "rows.parquet"))
    assert record["counts"]["failures"] == {"answers": 2} and record["counts"]["scored"] == 1


def test_a_run_in_which_all_fails_has_no_score(run, tmp_path):
    rows = [{**ROWS["pope"](index), "image": {"bytes": b"broken", "path": "x.png"}} for index in range(3)]
    with pytest.raises(ConvLlavaError, match="None of the 3 samples of POPE could be scored; 3 failed: .*x.png"):
        run("pope", save(rows, tmp_path / "rows.parquet"))
    assert not (tmp_path / "out" / "pope" / "record.json").exists()


def test_too_little_memory_halves_the_batch(run, assistant, tmp_path, monkeypatch):
    path = make("pope", tmp_path / "data", samples=6)
    _, _, expected = run("pope", path)
    sizes, ask = [], Predictor.predict

    def small(self, batch):
        sizes.append(len(batch.samples))
        if len(batch.samples) > 2:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return ask(self, batch)

    monkeypatch.setattr(Predictor, "predict", small)
    _, _, rows = run("pope", path, output="small", batch_size=6)
    assert sizes == [6, 3, 1, 2, 3, 1, 2]
    assert {name: row["prediction"] for name, row in rows.items()} == {
        name: row["prediction"] for name, row in expected.items()
    }
    monkeypatch.setattr(
        Predictor, "predict", lambda self, batch: (_ for _ in ()).throw(torch.OutOfMemoryError("none"))
    )
    with pytest.raises(ConvLlavaError, match="does not hold one question"):
        run("pope", path, output="none")


# --- batches


def test_batches_are_of_like_length_and_hold_everything_once():
    samples = [Sample(str(index), index, "", (), choices=("a",) * (index % 2)) for index in range(11)]
    lengths = [(7 * index) % 11 for index in range(11)]
    batches = runner.make_batches(samples, lengths, 3, apart=False)
    flat = [lengths[sample.row] for batch in batches for sample in batch]
    assert flat == sorted(lengths, reverse=True) and [len(batch) for batch in batches] == [3, 3, 3, 2]
    apart = runner.make_batches(samples, lengths, 3, apart=True)
    assert all(len({bool(sample.choices) for sample in batch}) == 1 for batch in apart)
    assert sorted(sample.row for batch in apart for sample in batch) == list(range(11))


def test_the_size_seen_is_that_of_the_upright_image(assistant):
    predictor = Predictor(assistant, None, 1)
    image = make_image(40, 80)
    assert predictor._seen(image) == ImageGeometry(80, 40, True)
    image.getexif()[0x0112] = 6
    assert predictor._seen(image) == ImageGeometry(40, 80, True)


# --- the command


def test_the_command(checkpoint, tmp_path, capsys):
    make("pope", tmp_path / "data" / "pope", samples=4)
    make("ai2d", tmp_path / "data" / "ai2d", samples=4)
    argv = ["eval", str(checkpoint), "--benchmark", "pope,AI2D", "--data", str(tmp_path / "data")]
    argv += ["--output", str(tmp_path / "out"), "--device", "cpu", "--dtype", "float32"]
    assert cli.main(argv) == 0
    printed = capsys.readouterr().out
    assert "POPE: F1 " in printed and "AI2D: accuracy " in printed and "4 samples, 128 px, by letter" in printed
    assert cli.main([*argv, "--json"]) == 0
    records = json.loads(capsys.readouterr().out)
    assert [record["benchmark"] for record in records] == ["POPE", "AI2D"]


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        ([], "Name a model and benchmarks"),
        (["MODEL", "--benchmark", "pop"], "no benchmark 'pop'"),
        (["MODEL", "--benchmark", "pope,mme", "--data", "x"], "--data is given 1 times for 2 benchmarks"),
        (["MODEL", "--benchmark", "pope", "--ocr-tokens", "--data", "."], "POPE has no OCR tokens"),
        (["nowhere", "--benchmark", "pope"], "no folder 'nowhere'"),
        (["--compare", "a", "b"], "holds no finished run"),
    ],
)
def test_mistakes_are_told_in_a_line(argv, message, checkpoint, capsys, monkeypatch):
    monkeypatch.setattr("convllava_hf.inference.load", lambda *args, **kwargs: pytest.fail("the model was loaded"))
    argv = [str(checkpoint) if word == "MODEL" else word for word in argv]
    assert cli.main(["eval", *argv]) == 2
    assert message in capsys.readouterr().err


def test_batches_are_made_ready_in_threads_without_disturbing_each_other(assistant, tmp_path):
    """A fast tokenizer refuses to be set to pad and not to pad while another thread uses it."""
    source = open_source(BENCHMARKS["ai2d"], make("ai2d", tmp_path, samples=12))
    samples = list(plan_samples(source, BENCHMARKS["ai2d"].prompt).samples.values())
    predictor = Predictor(assistant, source, 4, likelihood=True)
    batches = [samples[start : start + 2] for start in range(0, 12, 2)] * 4
    expected = [predictor.prepare(batch) for batch in batches[:6]] * 4
    with ThreadPoolExecutor(4) as pool:
        futures = [pool.submit(predictor.prepare, batch) for batch in batches]
        for _ in range(50):
            predictor.lengths(samples)
            assistant.processor.tokenizer(["a", "long one"] * 50, padding=True)
    for future, one in zip(futures, expected, strict=True):
        made = future.result()
        assert not made.failures and made.options == one.options
        assert torch.equal(made.inputs["input_ids"], one.inputs["input_ids"])


@pytest.mark.parametrize("device, beside", [("cpu", False), ("cuda", True)])
def test_batches_are_made_ready_beside_the_model_where_another_device_runs_it(device, beside):
    here = threading.get_ident()
    predictor = types.SimpleNamespace(
        assistant=types.SimpleNamespace(device=torch.device(device)),
        prepare=lambda batch: (threading.get_ident(), batch),
    )
    batches = [["a", "b"], ["c"], ["d"], ["e"]]
    threads, prepared = zip(*runner._prepared(predictor, batches), strict=True)
    assert list(prepared) == batches
    assert all((thread != here) is beside for thread in threads)


def test_two_runs_in_one_folder_are_one_too_many(run, tmp_path, scripted, monkeypatch):
    data = make("pope", tmp_path / "data")
    refusals = []

    def answer(sample) -> str:
        if not refusals:
            with pytest.raises(ConvLlavaError, match="being written by another process") as caught:
                run("pope", data)
            refusals.append(caught.value)
        return "Yes"

    scripted(answer)
    folder, record, rows = run("pope", data)
    assert len(refusals) == 1 and record["samples"] == len(rows)
    assert [path.name for path in folder.parent.iterdir()] == [folder.name]
    assert sorted(path.name for path in folder.iterdir()) == ["record.json", "run.json", "samples.jsonl"]
    run("pope", data, limit=2)  # another folder


def test_a_run_is_not_begun_in_a_folder_of_the_system(run, tmp_path):
    with pytest.raises(ConvLlavaError, match="--output is .*folder of the operating system"):
        run("pope", make("pope", tmp_path / "data"), output="/etc/convllava")
