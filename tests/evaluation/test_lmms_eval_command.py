"""lmms-eval asks our model, offline, tasks on local parquet files: `make test-lmms-eval`.

What it must come to is worked out with `Assistant.answer` alone, one question at a time.
"""

import inspect
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from helpers.pages import commands
from helpers.tiny_models import ask, make_image

from convllava_hf.cli import main
from convllava_hf.errors import ConvLlavaError
from convllava_hf.evaluation.engine import score_batch
from convllava_hf.evaluation.metrics import textvqa_accuracy
from convllava_hf.inference import Assistant, load, user_turn


pytest.importorskip("lmms_eval", reason="lmms-eval has an environment of its own: make test-lmms-eval")
datasets = pytest.importorskip("datasets")
pytestmark = pytest.mark.slow

TASKS = """
from lmms_eval.tasks.textvqa.utils import textvqa_doc_to_text, textvqa_process_results

PROMPT = {"pre_prompt": "", "post_prompt": "\\nAnswer the question using a single word or phrase."}


def images(doc):
    return [doc["image"].convert("RGB")]


def question(doc):
    return textvqa_doc_to_text(doc, PROMPT)


def score(doc, results):
    return {"exact_match": textvqa_process_results(doc, results)["exact_match"]}


def plain_question(doc):
    return doc["question"]


def options(doc):
    return doc["options"]


def in_rounds(doc, lmms_eval_specific_kwargs=None, previous_output=None, round_idx=None, previous_round_info=None):
    if not round_idx:
        return "Round 1: " + doc["question"]
    notes = (previous_round_info or "") + str(round_idx)
    ends = round_idx >= 1 + doc["question_id"] % 3
    visuals = images(doc) if round_idx == 1 else []
    return visuals, f"After {notes}: {previous_output[-1]}?", ends, previous_output, notes


def score_rounds(doc, results):
    return {"rounds": len(results[0]), "said": results[0]}


def listed(items):
    return "|".join("&".join(item) for item in items)
"""
HEAD = """
dataset_path: parquet
dataset_kwargs:
  data_files: {{validation: {parquet}}}
test_split: validation
doc_to_visual: !function tiny_tasks.images
"""
GENERATED = """
task: tiny_textvqa
output_type: generate_until
doc_to_text: !function tiny_tasks.question
doc_to_target: answer
generation_kwargs: {max_new_tokens: 32, temperature: 0}
process_results: !function tiny_tasks.score
metric_list: [{metric: exact_match, aggregation: mean, higher_is_better: true}]
"""
ROUNDS = """
task: tiny_rounds
output_type: generate_until_multi_round
doc_to_text: !function tiny_tasks.in_rounds
doc_to_target: answer
generation_kwargs: {max_new_tokens: 6, temperature: 0}
process_results: !function tiny_tasks.score_rounds
metric_list:
  - {metric: rounds, aggregation: mean, higher_is_better: true}
  - {metric: said, aggregation: !function tiny_tasks.listed, higher_is_better: true}
"""
CHOICE = """
task: tiny_choice
output_type: multiple_choice
doc_to_text: !function tiny_tasks.plain_question
doc_to_choice: !function tiny_tasks.options
doc_to_target: gold
metric_list: [{metric: acc}]
"""
OPTIONS = ["yes", "no", "a red car", "I"]
SHORT = "\nAnswer the question using a single word or phrase."


@pytest.fixture(scope="module")
def assistant(checkpoint) -> Assistant:
    return load(checkpoint, device="cpu", dtype="float32")


@pytest.fixture(scope="module")
def rows(assistant) -> list[dict]:
    """Seven questions of different lengths, some answered just as the model will, by some of ten people."""
    rows = []
    for number in range(7):
        image, question = make_image(60 + 7 * number, 80, seed=number), "What is this" + " really" * (number % 3)
        answer = assistant.answer([user_turn(question + SHORT, [image])], max_new_tokens=32).text
        (reply,) = score_batch(assistant, [ask(question, image)], [OPTIONS])
        best = max(range(4), key=lambda index: reply.likelihoods[index].log_likelihood)
        agreed = 3 * number % 11
        rows.append(
            {
                "image": image,
                "question": question,
                "question_id": number,
                "ocr_tokens": ["word"],
                "said": answer,
                "answers": [answer] * agreed + ["no"] * (10 - agreed),
                "options": OPTIONS,
                "answer": (right := best if number % 2 else (best + 1) % 4),
                "gold": OPTIONS[right],
                "right": number % 2,
            }
        )
    return rows


@pytest.fixture(scope="module")
def tasks(rows, tmp_path_factory) -> Path:
    """A folder for `--include_path`."""
    folder = tmp_path_factory.mktemp("tasks")
    data = datasets.Dataset.from_list(rows).cast_column("image", datasets.Image())
    data.to_parquet(folder / "validation.parquet")
    (folder / "tiny_tasks.py").write_text(TASKS)
    for name, body in {"generated": GENERATED, "rounds": ROUNDS, "choice": CHOICE}.items():
        (folder / f"{name}.yaml").write_text(body + HEAD.format(parquet=folder / "validation.parquet"))
    return folder


@pytest.fixture(scope="module")
def rounds(assistant, rows) -> list[list[str]]:
    """What the model says in rounds, asked one at a time."""
    talks = []
    for row in rows:
        said = []
        turn = user_turn("Round 1: " + row["question"], [row["image"]])
        for number in range(1, 2 + row["question_id"] % 3):
            said.append(assistant.answer([turn], max_new_tokens=6).text.strip())
            notes = "".join(map(str, range(1, number + 1)))
            turn = user_turn(f"After {notes}: {said[-1]}?", [row["image"]] if number == 1 else [])
        talks.append(said)
    return talks


def _expected_score(rows: list[dict]) -> float:
    return sum(textvqa_accuracy(row["said"], row["answers"]) for row in rows) / len(rows)


def _listed(rounds: list[list[str]]) -> str:
    return "|".join("&".join(said) for said in rounds)


@pytest.fixture(scope="module")
def command_results(checkpoint, tasks, tmp_path_factory) -> dict:
    """What lmms-eval's command writes; it runs once for all tasks that chat models are asked."""
    folder = tmp_path_factory.mktemp("command")
    command = [str(Path(sys.executable).with_name("lmms-eval")), "--model", "convllava", "--batch_size", "3"]
    command += ["--model_args", f"pretrained={checkpoint},dtype=float32,device=cpu"]
    command += ["--tasks", "tiny_textvqa,tiny_rounds", "--include_path", str(tasks)]
    command += ["--output_path", str(folder / "results"), "--log_samples"]
    offline = {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "HF_HOME": str(folder / "home")}
    run = subprocess.run(command, capture_output=True, text=True, cwd=folder, env={**os.environ, **offline})
    assert run.returncode == 0, run.stderr
    assert "ConvLLaVA answers" in run.stderr  # the progress bar
    (results,) = (folder / "results").rglob("*_results.json")
    return json.loads(results.read_text()) | {"folder": results.parent}


def test_command_gives_the_score_of_our_metric(command_results, rows):
    score = command_results["results"]["tiny_textvqa"]["exact_match,none"]
    assert score == pytest.approx(_expected_score(rows)) and 0.4 < score < 0.9
    (samples,) = command_results["folder"].glob("*_samples_tiny_textvqa.jsonl")
    logged = [json.loads(line) for line in samples.read_text().splitlines()]
    assert [sample["filtered_resps"] for sample in logged] == [row["said"].strip() for row in rows]
    assert [sample["token_counts"][0]["output_tokens"] for sample in logged] == [32] * len(rows)


def test_command_asks_in_rounds(command_results, rounds):
    results = command_results["results"]["tiny_rounds"]
    assert results["rounds,none"] == pytest.approx(sum(map(len, rounds)) / len(rounds))
    assert results["said,none"] == _listed(rounds)


def test_simple_kind_gives_the_same_and_weighs_options(checkpoint, tasks, rows, rounds, tmp_path, monkeypatch):
    from lmms_eval.evaluator import simple_evaluate
    from lmms_eval.tasks import TaskManager

    monkeypatch.setenv("HF_HOME", str(tmp_path))
    results = simple_evaluate(
        model="convllava",
        model_args=f"pretrained={checkpoint},dtype=float32,device=cpu",
        tasks=["tiny_textvqa", "tiny_rounds", "tiny_choice"],
        task_manager=TaskManager(include_path=str(tasks), include_defaults=False, model_name="convllava"),
        batch_size=4,
        force_simple=True,
        bootstrap_iters=0,
    )["results"]
    assert results["tiny_textvqa"]["exact_match,none"] == pytest.approx(_expected_score(rows))
    assert results["tiny_rounds"]["said,none"] == _listed(rounds)
    assert results["tiny_choice"]["acc,none"] == pytest.approx(sum(row["right"] for row in rows) / len(rows))


def test_our_own_command_gives_the_same_scores(command_results, checkpoint, tasks, rows, tmp_path, capsys):
    data = ["--data", str(tasks / "validation.parquet"), "--output", str(tmp_path), "--json"]
    given = [str(checkpoint), "--dtype", "float32", "--device", "cpu", "--batch-size", "4", *data]
    assert main(["eval", *given, "--benchmark", "textvqa"]) == 0
    (record,) = json.loads(capsys.readouterr().out)
    score = command_results["results"]["tiny_textvqa"]["exact_match,none"]
    assert record["score"] == pytest.approx(100 * score, abs=1e-4) and record["counts"]["answered"] == len(rows)
    # lmms-eval's score by likelihood is held to the same share of right ones in the test above.
    assert main(["eval", *given, "--benchmark", "ai2d", "--split", "validation", "--choice", "likelihood"]) == 0
    (record,) = json.loads(capsys.readouterr().out)
    assert record["score"] == pytest.approx(100 * sum(row["right"] for row in rows) / len(rows), abs=1e-4)


@pytest.fixture(scope="module")
def chat_model(checkpoint):
    from convllava_hf.evaluation.lmms_eval_models import ConvLlavaChat

    return ConvLlavaChat(str(checkpoint), batch_size="2", device="cpu", dtype="float32")


def _request(model, messages, gen_kwargs: dict):
    from lmms_eval.api.instance import Instance

    model.task_dict["task"] = {"test": [{}]}
    arguments = ("", lambda doc: messages, gen_kwargs, 0, "task", "test")
    return Instance("generate_until", arguments, 0, {"task": "task", "doc_id": 0, "repeats": 1})


def _said(text: str, *images) -> list[dict]:
    content = [{"type": "image", "url": image} for image in images]
    return [{"role": "user", "content": [*content, {"type": "text", "text": text}]}]


def test_generation_options_are_followed(chat_model, assistant):
    image = make_image(seed=1)
    whole = assistant.answer([user_turn("What is this?", [image])], max_new_tokens=8).text.strip()
    asked = [
        {"max_new_tokens": 8},
        {"max_new_tokens": 8, "temperature": 0, "top_p": 0.5, "num_beams": 1, "do_sample": False},
        {"max_new_tokens": 8, "until": [whole[2], ""]},
        {"max_new_tokens": 3, "do_sample": False, "temperature": 0.7},
        {"max_new_tokens": 8, "temperature": 50.0, "do_sample": True},
    ]
    requests = [_request(chat_model, _said("What is this?", image), options) for options in asked]
    first, same, cut, short, drawn = (result.text for result in chat_model.generate_until(requests))
    assert first == same == whole and cut == whole[: whole.index(whole[2])].strip()
    assert short == assistant.answer([user_turn("What is this?", [image])], max_new_tokens=3).text.strip()
    assert drawn != whole


def test_images_go_where_the_text_says(chat_model, assistant):
    images = [make_image(seed=1), make_image(seed=2)]
    text = "First <image> and then <image>: which?"
    result = chat_model.generate_until([_request(chat_model, _said(text, *images), {"max_new_tokens": 8})])
    assert result[0].text == assistant.answer([user_turn(text, images)], max_new_tokens=8).text.strip()
    with pytest.raises(ConvLlavaError, match="says <image> 2 times and comes with 1 images"):
        chat_model.generate_until([_request(chat_model, _said(text, images[0]), {"max_new_tokens": 8})])


def test_what_cannot_be_asked_is_refused(chat_model, checkpoint):
    video = [{"role": "user", "content": [{"type": "video", "url": "film.mp4"}]}]
    with pytest.raises(ConvLlavaError, match="The task 'task' shows video"):
        chat_model.generate_until([_request(chat_model, video, {})])
    with pytest.raises(ConvLlavaError, match="asks to generate with top_secret"):
        chat_model.generate_until([_request(chat_model, _said("?"), {"top_secret": 1})])
    with pytest.raises(ConvLlavaError, match="Add --force_simple"):
        chat_model.loglikelihood([_request(chat_model, _said("?"), {})])
    with pytest.raises(ConvLlavaError, match="batch_size is 'auto'"):
        type(chat_model)(str(checkpoint), batch_size="auto")


def test_commands_of_the_docs_are_understood(monkeypatch):
    from lmms_eval.__main__ import parse_eval_args
    from lmms_eval.models import get_model
    from lmms_eval.tasks import TaskManager
    from lmms_eval.utils import simple_parse_args_string

    tasks = set(TaskManager().all_tasks)
    for argv in commands("lmms-eval"):
        monkeypatch.setattr(sys, "argv", argv)
        _, args = parse_eval_args()
        model = get_model(args.model, args.force_simple)
        inspect.signature(model).bind(**simple_parse_args_string(args.model_args), batch_size=args.batch_size)
        assert set(args.tasks.split(",")) <= tasks, argv
