"""The model card: what it says, what stays empty, and that the Hub can read it."""

import ast
import json
import re
import shutil

import pytest
import yaml
from helpers.tiny_models import make_processor
from huggingface_hub import ModelCard

from convllava_hf.errors import ConvLlavaError
from convllava_hf.publish import About, read_about, read_results
from convllava_hf.publish.card import CardInput, check_card, render_card
from convllava_hf.publish.preflight import WidgetExample
from convllava_hf.publish.staging import stage
from convllava_hf.training_record import portable_name, read_record, write_record


REPO = "user/tiny"
TEXTVQA = {"benchmark": "TextVQA", "metric": "accuracy", "score": 65.8, "dataset": "lmms-lab/textvqa"}
STAGE = {
    "name": "stage3_instruct",
    "started_from": "checkpoints/convllava-7b-1024/stage2_pretrain",
    "method": "full",
    "trainable": ["projector", "language_model"],
    "data": [{"name": "data/llava/llava_v1_5_mix665k.json"}, {"name": "user/own-data", "split": "train"}],
    "hyperparameters": {"learning_rate": 2e-5, "warmup_steps": 0.03, "max_length": 2048, "bf16": True},
    "global_batch_size": 128,
    "steps": 5197,
    "train_loss": 0.8123456,
    "versions": {"torch": "2.13.0"},
}


@pytest.fixture
def staged(checkpoint, tmp_path):
    folder = tmp_path / "staged"
    folder.mkdir()
    return stage(checkpoint, folder)


def render(staged, about=None, **values):
    return render_card(staged, CardInput(REPO, about or About(license="llama2"), **values))


def metadata(card: str) -> dict:
    return yaml.safe_load(card.split("---\n")[1])


def section(card: str, heading: str) -> str:
    return card.split(f"\n{heading}\n", 1)[1].split("\n## ", 1)[0]


def test_metadata_are_those_of_the_hub(staged):
    card = render(staged, About(license="llama2", base_model=["lmsys/vicuna-7b-v1.5"], tags=["own"]))
    told = metadata(card)
    assert told["library_name"] == "transformers" and told["pipeline_tag"] == "image-text-to-text"
    assert told["license"] == "llama2" and told["language"] == ["en"]
    assert told["base_model"] == ["lmsys/vicuna-7b-v1.5"] and told["base_model_relation"] == "finetune"
    assert {"convllava", "custom_code", "own"} <= set(told["tags"])
    assert "widget" not in told and "model-index" not in told and "datasets" not in told
    assert ModelCard(card).data.to_dict() == told


def test_what_nobody_recorded_or_measured_is_visibly_empty(staged):
    card = render(staged)
    assert "*Not recorded.*" in section(card, "### Data") and "*Not recorded.*" in section(card, "### Training")
    assert "| vision tower | *not recorded* |" in card
    results = section(card, "## Results")
    assert "Nothing was measured" in results
    rows = re.findall(r"^\| (\w+) \|(.*)\|$", results, re.M)[1:]
    assert len(rows) == 10 and all(set(cells) <= {"|", " "} for _, cells in rows)


def test_the_models_own_figures(staged, model):
    card = render(staged)
    assert f"| parameters | {sum(p.numel() for p in model.parameters()):,}, in float32 |" in card
    assert "| 128 x 128 | 4 | this model's |" in card
    assert "| 768 x 768 | 144 |" in card and "| 1536 x 1536 | 576 |" in card
    assert "depths 1, 1, 2, 1, 1" in card and "2 layers of width 32" in card


@pytest.mark.parametrize(
    "kwargs, head, said",
    [
        ({}, "at\n128 x 128 pixels as 4 visual tokens, since", "padded to a square and resized to 128 x 128 pixels"),
        (
            {"preset": "small"},
            "at\nup to 589,824 pixels in their own shape as up to 144 visual tokens, since",
            "between 65,536 and 589,824 pixels, its size.* 144 at most",
        ),
        (
            {"image_aspect_ratio": "shortest_edge"},
            "at\na shorter side of 128 pixels, in up to 32 visual tokens, since",
            "shorter side becomes 128 pixels.* 32 at most",
        ),
    ],
)
def test_the_card_says_how_images_are_seen(checkpoint, tmp_path, kwargs, head, said):
    folder = shutil.copytree(checkpoint, tmp_path / "checkpoint")
    make_processor(**kwargs).save_pretrained(folder)
    (tmp_path / "staged").mkdir()
    card = render(stage(folder, tmp_path / "staged"))
    seen = section(card, "## Resolution and visual tokens")
    assert head in card
    assert re.search(said, seen, re.S)
    assert "| `large`: 2,359,296 pixels | up to 576 |  |" in seen
    assert seen.count("this model's") == (0 if "image_aspect_ratio" in kwargs else 1)
    assert ("| `small`: 589,824 pixels | up to 144 | this model's |" in seen) is ("preset" in kwargs)
    assert ("long or wide images lose most" in card) is (not kwargs)
    assert "\n\n\n" not in card.split("## Intended use")[1].split("## ")[0]


@pytest.mark.parametrize("preset, frame", [(None, "the padded square: its side"), ("small", "the image, not of a")])
@pytest.mark.parametrize("boxes, entries", [(None, []), ("square", []), ("image", []), ("image", ["square", "image"])])
def test_the_card_says_what_boxes_are_fractions_of(preset, frame, boxes, entries, checkpoint, tmp_path):
    folder = shutil.copytree(checkpoint, tmp_path / "checkpoint")
    make_processor(preset=preset).save_pretrained(folder)
    data = [{"name": f"{number}.json", "boxes": entry} for number, entry in enumerate(entries)]
    write_record(folder, stages=[{**STAGE, **({"boxes": boxes} if boxes else {}), **({"data": data} if data else {})}])
    (tmp_path / "staged").mkdir()
    seen = section(render(stage(folder, tmp_path / "staged")), "## Resolution and visual tokens")
    assert "\n\n\n" not in seen
    seen = " ".join(seen.split())
    assert f"`[0.10, 0.20, 0.40, 0.55]`, are left, top, right and bottom in fractions of {frame}" in seen
    own = "square" if preset is None else "image"
    told = set(entries) or {boxes} - {None}
    assert ("Training rewrote the boxes" in seen) is bool(told - {own})
    assert ("fractions of the padded square or of the image" in seen) is (told == {"square", "image"})


def test_results_become_a_table_and_a_model_index(staged, tmp_path):
    file = tmp_path / "textvqa.json"
    file.write_text(json.dumps({"results": [{**TEXTVQA, "samples": 5000, "interval": [64.5, 67.1], "other": 1}]}))
    more = tmp_path / "more.json"
    more.write_text(json.dumps({**TEXTVQA, "benchmark": "MyBench", "score": 1, "setting": "a | b"}))
    card = render(staged, results=read_results(file, more))
    results = section(card, "## Results")
    assert "| TextVQA | accuracy | 65.8 (64.5 to 67.1) | lmms-lab/textvqa, 5000 samples |" in results
    assert "| DocVQA |  |  |  |" in results and "An empty row was not measured." in results
    assert r"| MyBench | accuracy | 1 | a \| b, lmms-lab/textvqa |" in results
    found = ModelCard(card).data.eval_results
    assert [(one.dataset_type, one.metric_type, one.metric_value) for one in found] == [
        ("lmms-lab/textvqa", "accuracy", 65.8),
        ("lmms-lab/textvqa", "accuracy", 1),
    ]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("nonsense", "not valid JSON"),
        ("[]", "no result"),
        ("[1]", "result 1: expected an object"),
        ({**TEXTVQA, "score": "65.8"}, "score is '65.8'"),
        ({**TEXTVQA, "score": float("nan")}, "finite"),
        ({**TEXTVQA, "score": 10**400}, "finite"),
        ({**TEXTVQA, "score": True}, "score is True"),
        ({**TEXTVQA, "setting": "x" * 501}, "more than 500 characters"),
        ({**TEXTVQA, "dataset": None}, "dataset is None"),
        ({**TEXTVQA, "interval": [1]}, "low, high"),
        ({**TEXTVQA, "samples": -1}, "samples is -1"),
        ({**TEXTVQA, "source_name": "me"}, "go together"),
        ([TEXTVQA, TEXTVQA], "Two of the results"),
    ],
)
def test_results_that_cannot_be_used_are_named(tmp_path, content, message):
    file = tmp_path / "results.json"
    file.write_text(content if isinstance(content, str) else json.dumps(content))
    with pytest.raises(ConvLlavaError, match=message):
        read_results(file)
    with pytest.raises(ConvLlavaError, match="cannot be read"):
        read_results(tmp_path / "missing.json")


def test_the_training_record_gives_lineage_data_and_hyperparameters(staged):
    origin = {
        "vision_tower": "timm/convnext_large_mlp.clip_laion2b_ft_soup_320",
        "language_model": "lmsys/vicuna-7b-v1.5",
    }
    first = {**STAGE, "name": "stage1_projector", "started_from": "assembled", "data": [], "train_loss": None}
    write_record(staged.folder, origin=origin, stages=[first, STAGE])
    card = render(staged)
    assert metadata(card)["base_model"] == list(origin.values())
    assert metadata(card)["datasets"] == ["liuhaotian/LLaVA-Instruct-150K", "user/own-data"]
    data = section(card, "### Data")
    assert "(https://huggingface.co/datasets/liuhaotian/LLaVA-Instruct-150K) | cc-by-4.0 | stage3_instruct |" in data
    assert "(https://huggingface.co/datasets/user/own-data) | *not stated* | stage3_instruct |" in data
    training = section(card, "### Training")
    assert "| | stage1_projector | stage3_instruct |" in training
    assert "| learning rate | 2e-05 | 2e-05 |" in training and "| warm-up | 3% | 3% |" in training
    assert "| training loss |  | 0.8123 |" in training and "| seed |" not in training
    assert "torch 2.13.0" in training


def test_paths_of_this_machine_do_not_get_into_a_record(tmp_path, monkeypatch):
    write_record(tmp_path, origin={"vision_tower": "/home/me/tower", "language_model": "org/model"})
    assert read_record(tmp_path)["origin"] == {"vision_tower": "tower", "language_model": "org/model"}
    assert portable_name(r"C:\Users\me\tower") == "tower" and portable_name("~/tower") == "tower"
    monkeypatch.chdir(tmp_path)
    (tmp_path / "org" / "mine").mkdir(parents=True)
    assert portable_name("org/mine") == portable_name("./org/mine") == "mine"  # no id, though it looks like one
    assert portable_name(".") == tmp_path.name and portable_name("org/theirs") == "org/theirs"


@pytest.mark.parametrize("content", ["", "[]", '{"stages": 1}', '{"stages": [1], "origin": 2}'])
def test_a_damaged_record_counts_as_none(tmp_path, content):
    (tmp_path / "training_record.json").write_text(content)
    assert read_record(tmp_path) == {"format": 1, "origin": {}, "stages": []}


def test_examples_are_in_the_page_and_the_widget(staged):
    (staged.folder / "examples").mkdir()
    (staged.folder / "examples" / "example-1.jpg").write_bytes(b"image")
    shown = [WidgetExample("What is *it*?", "examples/example-1.jpg")]
    answer = "A <b>sign</b>.\n---\n# No heading\x07"
    card = render(staged, examples=shown, answers=[answer])
    assert metadata(card)["widget"] == [
        {"text": "What is *it*?", "src": "examples/example-1.jpg", "output": {"text": answer}}
    ]
    page = section(card, "## Examples")
    assert r"**What is \*it\*?**" in page
    assert "> A \\<b\\>sign\\</b\\>.\n> ---\n> \\# No heading\n" in page
    (staged.folder / "examples" / "example-1.jpg").unlink()
    with pytest.raises(ConvLlavaError, match="would not be uploaded"):
        check_card(card, staged)


def test_the_code_in_the_card_is_code(staged):
    card = render(staged)
    blocks = re.findall(r"```(\w+)\n(.*?)```", card, re.S)
    assert [kind for kind, _ in blocks] == ["python", "python", "bash", "bash", "yaml", "bibtex"]
    for kind, block in blocks:
        if kind == "python":
            assert REPO in block and ast.parse(block)
        if kind == "yaml":
            assert yaml.safe_load(block)["model_name_or_path"] == REPO


def test_the_fine_tuning_recipe_in_the_card_is_one_of_trl(staged, tmp_path):
    trl = pytest.importorskip("trl")
    recipe = tmp_path / "lora.yaml"
    recipe.write_text(re.search(r"```yaml\n(.*?)```", render(staged), re.S)[1] + "\nuse_cpu: true\nbf16: false\n")
    parser = trl.TrlParser((trl.ScriptArguments, trl.SFTConfig, trl.ModelConfig))
    data, _, model = parser.parse_args_and_config(["--config", str(recipe)])
    assert model.use_peft and model.lora_modules_to_save == ["multi_modal_projector"]
    assert data.dataset_name == "HuggingFaceH4/llava-instruct-mix-vsft"


def test_an_adapters_card_loads_the_base_model_first(checkpoint, tmp_path):
    from safetensors.torch import save_file
    from torch import ones

    source, folder = tmp_path / "adapter", tmp_path / "staged"
    shutil.copytree(checkpoint, source)
    (source / "model.safetensors").unlink()
    save_file({"base_model.model.lora_A.weight": ones(4, 4)}, source / "adapter_model.safetensors")
    config = {"base_model_name_or_path": "user/base", "r": 4, "lora_alpha": 8, "modules_to_save": ["projector"]}
    (source / "adapter_config.json").write_text(json.dumps(config))
    folder.mkdir()
    card = render(stage(source, folder))
    told = metadata(card)
    assert told["library_name"] == "peft" and told["base_model"] == ["user/base"]
    assert told["base_model_relation"] == "adapter" and "lora" in told["tags"]
    assert "rank 4, alpha 8; saved whole along with it: projector" in card
    assert 'PeftModel.from_pretrained(model, "user/tiny")' in card and "vllm serve" not in card


def test_what_the_publisher_tells(staged, tmp_path):
    file = tmp_path / "about.yaml"
    file.write_text(
        """
        title: Tiny
        description: Reads signs.
        license: other
        license_name: mine
        license_link: https://example.org/licence
        language: [en, de]
        datasets: [{id: user/signs, license: cc0-1.0, use: stage 3}, {name: Private signs}]
        limits: [It knows no trees.]
        """
    )
    about = read_about(file)
    card = render(staged, about)
    told = metadata(card)
    assert told["license_name"] == "mine" and told["language"] == ["en", "de"]
    assert told["datasets"] == ["user/signs"]
    assert card.split("---\n", 2)[2].strip().startswith("# Tiny\n\nReads signs.\n")
    assert "| Private signs | *not stated* |" in card and "- It knows no trees." in card
    assert "[mine](https://example.org/licence)" in card


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({}, "needs a license"),
        ({"license": "vicuna"}, "does not know the license"),
        ({"license": "other"}, "license_name"),
        ({"license": "mit", "language": ["english"]}, "ISO 639"),
        ({"license": "mit", "base_model": ["./here"]}, "owner/name"),
        ({"license": "mit", "datasets": [{"license": "mit"}]}, "expected id or name"),
        ({"license": "mit", "datasets": [{"id": "no id"}]}, "owner/name"),
    ],
)
def test_what_the_hub_would_not_understand_is_refused(values, message):
    with pytest.raises(ConvLlavaError, match=message):
        About(**values).check()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("- a", "no keys"),
        ("licence: mit", "unknown key 'licence'"),
        ("title: [1]", "expected a text"),
        ("a: [", "YAML"),
    ],
)
def test_an_about_file_that_cannot_be_used(tmp_path, content, message):
    file = tmp_path / "about.yaml"
    file.write_text(content)
    with pytest.raises(ConvLlavaError, match=message):
        read_about(file)
    with pytest.raises(ConvLlavaError, match="cannot be read"):
        read_about(tmp_path / "missing.yaml")


# --- a stranger's words


EVIL = [
    "<img src=https://evil.example/x.png onerror=alert(1)>",
    "![x](https://evil.example/x.png)",
    "[click](https://evil.example)",
    "https://evil.example www.evil.example <https://evil.example> me@evil.example",
    "a | b\n\n# Heading\n<script>alert(1)</script>",
    "`code` *bold* **strong** ~~gone~~ $x$ &lt;b&gt; \\| \x1b[31m \ud800",
    "``` <b>",
    "x" * 100_000,
]


def _told_by_a_stranger(staged, tmp_path, words: str) -> str:
    """A card of which a record and a file of results say the same words everywhere."""
    told = {
        "name": words,
        "started_from": words,
        "method": words,
        "trainable": [words, words],
        "data": [{"name": words}],
        "hyperparameters": {"optim": words, "lr_scheduler_type": words, "seed": words, "warmup_steps": words},
        "lora": {"r": words, "modules_to_save": [words]},
        "dtype": words,
        "steps": words,
        "versions": {words: words, "torch": words},
    }
    record = {"origin": dict.fromkeys(("vision_tower", "language_model", "checkpoint"), words), "stages": [told]}
    (staged.folder / "training_record.json").write_text(json.dumps(record))
    file = tmp_path / "results.json"
    keys = ("benchmark", "metric", "dataset", "split", "setting", "source_name")
    result = {**TEXTVQA, **dict.fromkeys(keys, words[:400]), "source_url": "https://example.org/a"}
    file.write_text(json.dumps(result))
    return render(staged, results=read_results(file))


@pytest.mark.parametrize("evil", EVIL, ids=range(len(EVIL)))
def test_what_a_stranger_recorded_and_measured_is_shown_as_text(staged, tmp_path, evil):
    markdown_it = pytest.importorskip("markdown_it")
    harmless = _parsed(markdown_it, _told_by_a_stranger(staged, tmp_path, "word"))
    card = _told_by_a_stranger(staged, tmp_path, evil)
    card.encode()
    assert len(card) < 60_000
    assert _parsed(markdown_it, card) == harmless
    assert not harmless["html"] and "https://example.org/a" in harmless["links"]


def _parsed(markdown_it, card: str) -> dict:
    """What a reader of GitHub's Markdown makes of a card."""
    text = card.split("---\n", 2)[2]
    reader = markdown_it.MarkdownIt("commonmark", {"html": True}).enable(["table", "strikethrough"])
    tokens = reader.parse(text)
    inline = [child for token in tokens for child in token.children or ()]
    # GitHub and the Hub make links of bare addresses as well.
    prose = re.sub(r"(?<!\\)`[^`]*`", "", "".join(re.findall(r"^\|.*$|^Software.*$", text, re.M)))  # none in code
    bare = re.findall(r"(?:https?://|www\.)\S*evil|\w@evil", prose)
    return {
        "headings": sum(token.type == "heading_open" for token in tokens),
        "tables": sum(token.type == "table_open" for token in tokens),
        "images": [one.attrs["src"] for one in inline if one.type == "image"],
        "html": [token.content for token in (*tokens, *inline) if token.type.startswith("html")],
        "links": {one.attrs["href"] for one in inline if one.type == "link_open"} | set(bare),
    }


@pytest.mark.parametrize(
    "wrong", [5, 1.5, True, None, "text", [], [1], {"a": 1}, {"a": [{}]}, [[[]]], [{"name": [1]}]]
)
def test_wrong_types_in_a_record_do_not_break_the_card(staged, wrong):
    keys = (*STAGE, "lora", "origin", "eval_loss", "devices", "epochs", "dtype")
    stages = [{**STAGE, key: wrong} for key in keys]
    stages += [{**STAGE, "hyperparameters": dict.fromkeys(STAGE["hyperparameters"], wrong)}]
    stages += [{**STAGE, "lora": {"r": wrong, "modules_to_save": wrong}}, {**STAGE, "versions": {"torch": wrong}}]
    for record in (
        *({"origin": {}, "stages": [one]} for one in stages),
        {"origin": {"vision_tower": wrong, "language_model": wrong, "checkpoint": wrong}, "stages": stages},
        {"origin": wrong, "stages": [wrong]},
        {"origin": wrong, "stages": wrong},
    ):
        (staged.folder / "training_record.json").write_text(json.dumps(record))
        assert "## Where it comes from" in render(staged)


@pytest.mark.parametrize(
    "url", ["javascript:alert(1)", "https://a.example) ![x](https://evil.example", "ftp://x", "<b>"]
)
def test_the_source_of_a_result_is_an_address(tmp_path, url):
    file = tmp_path / "results.json"
    file.write_text(json.dumps({**TEXTVQA, "source_name": "me", "source_url": url}))
    with pytest.raises(ConvLlavaError, match="source_url is .*; expected an address"):
        read_results(file)
