"""Pushing to the Hub and loading from it by id, against a double of it on loopback."""

import json

import pytest
from helpers.fake_hub import serve_hub
from helpers.fresh_process import ANSWERS, run_fresh
from helpers.tiny_models import ask, make_image


pytestmark = pytest.mark.slow

QUESTION = "What is on the sign?"
NAME = "AutoModelForImageTextToText"


@pytest.fixture(scope="module")
def hub():
    with serve_hub() as hub:
        yield hub


@pytest.fixture(scope="module")
def environment(hub) -> dict:
    return {"HF_ENDPOINT": hub.url, "HF_HUB_DISABLE_XET": "1", "HF_HUB_OFFLINE": None, "HF_TOKEN": "hf_nobody"}


@pytest.fixture(scope="module")
def image(tmp_path_factory):
    path = tmp_path_factory.mktemp("image") / "image.png"
    make_image(seed=3).save(path)
    return path


@pytest.fixture(scope="module")
def pushed(hub, environment, checkpoint, tmp_path_factory) -> dict:
    """What a process with the package pushed: to main, and with other answers allowed to a branch of its own."""
    return run_fresh(
        """
        import convllava_hf
        from huggingface_hub import HfApi

        HfApi().create_repo("user/folder")
        HfApi().upload_folder(repo_id="user/folder", folder_path=values["checkpoint"])
        model = transformers.AutoModelForImageTextToText.from_pretrained(values["checkpoint"])
        processor = transformers.AutoProcessor.from_pretrained(values["checkpoint"])
        model.push_to_hub("user/tiny")
        processor.push_to_hub("user/tiny")
        # Both at once with saving, and a revision.
        model.generation_config.max_new_tokens = 3
        model.save_pretrained(values["folder"], push_to_hub=True, repo_id="user/second")
        processor.save_pretrained(values["folder"], push_to_hub=True, repo_id="user/second")
        model.push_to_hub("user/tiny", revision="short")
        processor.push_to_hub("user/tiny", revision="short")
        result = model.config.auto_map
        """,
        package=True,
        env=environment,
        checkpoint=checkpoint,
        folder=str(tmp_path_factory.mktemp("second")),
    )


@pytest.mark.parametrize("repository", ["user/tiny", "user/second"])
def test_what_is_pushed_is_what_is_saved(pushed, hub, checkpoint, repository):
    files = hub.files(repository)
    saved = {path.name: path.read_bytes() for path in checkpoint.iterdir()}
    assert set(saved) <= set(files)
    assert set(files) - set(saved) <= {"README.md", ".gitattributes"}
    alike = ("processor_config.json", "preprocessor_config.json", "chat_template.jinja", "tokenizer.json")
    for name in (*alike, *(name for name in saved if name.endswith(".py"))):
        assert files[name] == saved[name], name
    assert json.loads(files["config.json"])["auto_map"] == json.loads(saved["config.json"])["auto_map"] == pushed


def test_a_folder_that_is_uploaded_arrives_as_it_is(pushed, hub, checkpoint):
    files = hub.files("user/folder")
    files.pop(".gitattributes", None)
    assert files == {path.name: path.read_bytes() for path in checkpoint.iterdir()}


@pytest.fixture(scope="module")
def found(pushed, environment, image) -> dict:
    return run_fresh(
        ANSWERS
        + """
from huggingface_hub import snapshot_download

trust = {"trust_remote_code": True}
name = values["name"]
result = {
    "by id": answers("user/tiny", [name, "AutoModel"], **trust),
    "folder": answers("user/folder", [name], **trust),
    "files": sorted(path.name for path in Path(snapshot_download("user/tiny")).iterdir()),
    "lengths": {},
}
for revision in ("main", "short"):
    config = transformers.GenerationConfig.from_pretrained("user/tiny", revision=revision)
    result["lengths"][revision] = config.max_new_tokens
result["short"] = answers("user/tiny", [name], revision="short", **trust)
try:
    transformers.AutoModel.from_pretrained("user/tiny", revision="missing", **trust)
except OSError as error:
    result["missing"] = str(error)
transformers.AutoModelForImageTextToText.from_pretrained("user/tiny", **trust).push_to_hub("user/third")
transformers.AutoProcessor.from_pretrained("user/tiny", **trust).push_to_hub("user/third")
result["third"] = answers("user/third", [name], **trust)
""",
        env=environment,
        image=image,
        question=QUESTION,
        name=NAME,
    )


def test_a_process_without_the_package_loads_it_by_id(found, model, processor, image):
    inputs = processor.apply_chat_template(
        ask(QUESTION, str(image)), add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt"
    )
    ids = model.generate(**inputs, max_new_tokens=16, do_sample=False)
    assert found["by id"][NAME]["ids"] == ids[0, inputs["input_ids"].shape[1] :].tolist()
    assert found["by id"][NAME]["module"].startswith("transformers_modules.user.tiny.")
    assert found["folder"][NAME]["ids"] == found["by id"][NAME]["ids"]
    assert found["by id"]["AutoModel"]["class"] == "ConvLlavaModel"


def test_the_whole_repository_can_be_downloaded(found, checkpoint):
    assert set(found["files"]) >= {path.name for path in checkpoint.iterdir()}


def test_a_revision_is_another_model(found):
    assert found["lengths"] == {"main": None, "short": 3}
    assert found["short"][NAME]["ids"] == found["by id"][NAME]["ids"]
    assert "missing" in found["missing"]


def test_what_was_loaded_by_id_can_be_pushed_elsewhere(found, hub):
    """Its entries must name its own files, not those of the repository that it came from."""
    config = json.loads(hub.files("user/third")["config.json"])
    assert all("--" not in reference for reference in config["auto_map"].values())
    assert set(hub.files("user/third")) >= {"modeling_convllava.py", "processing_convllava.py"}
    assert found["third"][NAME]["ids"] == found["by id"][NAME]["ids"]
    assert found["third"][NAME]["module"].startswith("transformers_modules.user.third.")
