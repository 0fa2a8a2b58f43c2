"""The scripts in `examples`, as they are, on a tiny checkpoint."""

import json
import re
import runpy

import pytest
import torch
import transformers
from helpers.paths import ROOT
from PIL import Image

from convllava_hf import ConvLlavaImageProcessor, load, open_image, user_turn


EXAMPLES = ROOT / "examples"


@pytest.fixture
def folder(converted_checkpoint, golden, tmp_path, monkeypatch):
    """A folder with what the scripts name, as the current one."""
    (tmp_path / "ConvLLaVA-1536").symlink_to(converted_checkpoint("stage3"))
    for name, image in (("photo.jpg", "photo.jpg"), ("page.png", "tall.png")):
        (tmp_path / name).write_bytes((golden / "images" / image).read_bytes())
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_ask_document(folder, capsys):
    """It answers all questions, the first as without the prompt cache, and keeps the page's shape."""
    questions = runpy.run_path(str(EXAMPLES / "ask_document.py"))["QUESTIONS"]
    printed = capsys.readouterr().out
    page = Image.open(folder / "page.png")
    tokens = ConvLlavaImageProcessor(preset="large").image_sizing().tokens(page.height, page.width)
    shown = re.findall(r"^\((\d+) visual tokens", printed, flags=re.M)
    assert shown == [str(tokens)] * len(questions) and len(set(questions)) == 3
    assistant = load("ConvLLaVA-1536", image_options={"preset": "large"})
    first = assistant.answer([user_turn(questions[0], [open_image("page.png")])], max_new_tokens=128)
    assert printed.startswith(f"{questions[0]}\n{first.text}\n")


def test_finetune_sft(folder):
    """It trains the language model and the projector towards the answers, not the tower, and its result loads."""
    for module in ("trl", "peft", "datasets"):
        pytest.importorskip(module)
    if tuple(int(part) for part in transformers.__version__.split(".")[:2]) < (5, 18):
        pytest.skip("training needs transformers >= 5.18")
    answers = ["Harbor Street", "Old Mill Lane", "Exit 42", "Station Road"]
    samples = [{"image": "photo.jpg", "question": "What is on the sign?", "answer": answer} for answer in answers]
    (folder / "samples.jsonl").write_text("".join(json.dumps(sample) + "\n" for sample in samples))
    collator = runpy.run_path(str(EXAMPLES / "finetune_sft.py"))["trainer"].data_collator

    before, after = (load(name, device="cpu", dtype="float32").model for name in ("ConvLLaVA-1536", "finetuned"))
    changed = {
        name.split(".")[1]
        for (name, old), new in zip(before.named_parameters(), after.parameters(), strict=True)
        if not torch.equal(old.bfloat16(), new.bfloat16())
    }
    assert changed == {"language_model", "multi_modal_projector"}
    question = [{"type": "image"}, {"type": "text", "text": samples[0]["question"]}]
    messages = [
        {"role": "user", "content": question},
        {"role": "assistant", "content": [{"type": "text", "text": answers[0]}]},
    ]
    batch = collator([{"images": [Image.open("photo.jpg")], "messages": messages}])
    with torch.no_grad():
        assert after(**batch).loss < before(**batch).loss
