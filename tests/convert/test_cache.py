"""Original checkpoints used as they are: converted once, reused, and converted again when anything has changed."""

import contextlib
import errno
import io
import json
import shutil
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from helpers import golden_variants
from helpers.fresh_process import run_fresh
from helpers.tiny_models import make_image

from convllava_hf import cli
from convllava_hf.convert import cache
from convllava_hf.convert import checkpoint as conversion
from convllava_hf.convert.cache import CACHE_VARIABLE, cache_folder, converted_checkpoint
from convllava_hf.convert.writing import ShardWriter
from convllava_hf.errors import ConvLlavaError
from convllava_hf.inference import load, open_image, user_turn
from convllava_hf.inference.loading import load_processor
from convllava_hf.training_record import read_record


EXACT = ["--device", "cpu", "--dtype", "float32", "--max-new-tokens", "24"]


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch) -> Path:
    """The cache."""
    monkeypatch.setenv(CACHE_VARIABLE, str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def source(golden, tmp_path) -> Path:
    return Path(shutil.copytree(golden / "checkpoint-stage3", tmp_path / "source"))


@pytest.fixture
def conversions(monkeypatch) -> list:
    """The sources of the conversions that are made."""
    made, convert = [], conversion.convert_checkpoint

    def counted(source, *args, **kwargs):
        made.append(source)
        return convert(source, *args, **kwargs)

    monkeypatch.setattr(conversion, "convert_checkpoint", counted)
    return made


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir() if not path.name.startswith("."))


def question_of(case: dict) -> str:
    return case["turns"][0][1].removeprefix("<image>\n")


def test_an_original_is_converted_once_and_answers_as_the_original_did(
    source, folder, conversions, golden, golden_cases, caplog
):
    case = golden_cases["one-image"]
    turn = user_turn(question_of(case), [open_image(golden / "images" / case["images"][0])])
    for _ in range(2):
        answer = load(source, device="cpu", dtype="float32").answer([turn], max_new_tokens=24)
        assert answer.token_ids == case["generated"]
    assert conversions == [str(source)]
    (said,) = [record.getMessage() for record in caplog.records if "converting" in record.getMessage()]
    (name,) = names(folder)
    assert said.startswith(str(source)) and said.endswith(f"once into {folder / name}.") and "\n" not in said
    assert name.startswith("source-")


def test_a_converted_checkpoint_is_taken_as_it_is(checkpoint, folder, conversions):
    assert converted_checkpoint(checkpoint) == str(checkpoint)
    assert not conversions and not folder.exists()


CHANGES = [
    lambda source: (source / "model.safetensors").touch(),
    lambda source: golden_variants.edit_json(source / "config.json", mm_vision_resolution=384),
    lambda source: (source / "vision_tower" / "pytorch_model.bin").touch(),
    lambda source: golden_variants.edit_json(source / "vision_tower" / "preprocessor_config.json", resample=2),
    lambda source: (source / "tokenizer.model").touch(),
]


@pytest.mark.parametrize("change", CHANGES)
def test_what_has_changed_is_converted_again(source, folder, conversions, change):
    first = converted_checkpoint(source)
    change(source)
    second = converted_checkpoint(source)
    assert second != first and len(conversions) == 2 and converted_checkpoint(source) == second
    assert len(names(folder)) == 2


def test_a_tower_elsewhere_counts(source, tmp_path, conversions):
    golden_variants.tower_named_relatively(source)
    first = converted_checkpoint(source)
    (tmp_path / "tower" / "pytorch_model.bin").touch()
    assert converted_checkpoint(source) != first and len(conversions) == 2


def test_other_code_converts_again(source, conversions, monkeypatch):
    first = converted_checkpoint(source)
    monkeypatch.setattr(cache, "_code", lambda: "another")
    assert converted_checkpoint(source) != first and len(conversions) == 2


def test_a_commit_on_the_hub_is_the_name(source, tmp_path, conversions, monkeypatch):
    """Offline, from huggingface_hub's cache: another commit of checkpoint or tower is another conversion."""
    from huggingface_hub import constants

    hub, tower = tmp_path / "hub", tmp_path / "tower"
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(hub))
    monkeypatch.setattr("transformers.utils.hub.HF_HUB_CACHE", str(hub), raising=False)
    monkeypatch.setattr(
        "convllava_hf.inference.loading.cached_file",
        lambda name, file, revision=None: cache.hf_hub_download(name, file),
    )
    golden_variants.as_released(source, tower)
    golden_variants.into_hub_cache(hub, golden_variants.RELEASED_TOWER, tower)
    golden_variants.into_hub_cache(hub, "org/original", source)
    first = converted_checkpoint("org/original")
    assert converted_checkpoint("org/original") == first and conversions == ["org/original"]
    assert Path(first).name.startswith("org--original-")
    origin = read_record(first)["origin"]
    assert (origin["checkpoint"], origin["vision_tower"]) == ("org/original", golden_variants.RELEASED_TOWER)
    home = hub / f"models--{golden_variants.RELEASED_TOWER.replace('/', '--')}"
    commit = (home / "refs" / "main").read_text()
    (home / "snapshots" / commit).rename(home / "snapshots" / ("0" * 40))
    (home / "refs" / "main").write_text("0" * 40)
    assert converted_checkpoint("org/original") != first and len(conversions) == 2


def test_a_tower_of_second_choice_is_told_at_every_use(source, caplog):
    golden_variants.tower_in_the_main_shards(source)
    (source / "vision_tower" / "pytorch_model.bin").unlink()
    for _ in range(2):
        caplog.clear()
        converted_checkpoint(source)
        assert "which the original would not use" in caplog.text


def test_two_at_once_convert_once(source, conversions):
    found, start = [], threading.Barrier(3)

    def convert():
        start.wait()
        found.append(converted_checkpoint(source))

    threads = [threading.Thread(target=convert) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 3 and len(set(found)) == 1 and len(conversions) == 1
    load_processor(found[0])


def test_an_interrupted_conversion_leaves_nothing_to_be_taken(source, folder, monkeypatch):
    write = ShardWriter.write

    def interrupted(self, name, tensor):
        if name == "lm_head.weight":
            raise KeyboardInterrupt
        write(self, name, tensor)

    with monkeypatch.context() as patch:
        patch.setattr(ShardWriter, "write", interrupted)
        with pytest.raises(KeyboardInterrupt):
            converted_checkpoint(source)
    assert names(folder) == []
    load_processor(converted_checkpoint(source))


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EROFS, errno.EACCES, errno.EDQUOT])
def test_a_full_or_closed_cache_is_one_error_with_the_remedy(source, folder, monkeypatch, capsys, number):
    def fails(self, name, tensor):
        raise OSError(number, "It does not go")

    monkeypatch.setattr(ShardWriter, "write", fails)
    assert cli.main(["chat", str(source)]) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith("convllava: error: ") and "It does not go" in error
    assert str(folder) in error and CACHE_VARIABLE in error and f"convllava convert {source} OUT" in error
    assert names(folder) == []


def test_a_cache_that_is_a_file(source, folder):
    folder.write_text("")
    with pytest.raises(ConvLlavaError, match=CACHE_VARIABLE):
        converted_checkpoint(source)


def test_a_cache_that_can_only_be_read_is_used(source, folder, monkeypatch):
    first = converted_checkpoint(source)
    monkeypatch.setattr("filelock.FileLock", lambda *args: pytest.fail("a lock was wanted"))
    assert converted_checkpoint(source) == first


def test_what_cannot_be_converted_names_the_command(source):
    shutil.rmtree(source / "vision_tower")
    with pytest.raises(ConvLlavaError, match="--vision-tower.*convllava convert .* OUT"):
        converted_checkpoint(source)


def test_the_cache_lies_beside_hugging_faces(monkeypatch, tmp_path):
    from huggingface_hub import constants

    monkeypatch.delenv(CACHE_VARIABLE)
    monkeypatch.setattr(constants, "HF_HOME", str(tmp_path / "hf"))
    assert cache_folder() == tmp_path / "hf" / "convllava"


# --- the commands


def test_ask_and_chat_take_an_original(source, conversions, golden, golden_cases, capsys, monkeypatch):
    case = golden_cases["one-image"]
    image, question = str(golden / "images" / case["images"][0]), question_of(case)
    assert cli.main(["ask", str(source), image, question, "--json", *EXACT]) == 0
    answer = json.loads(capsys.readouterr().out)
    assert answer["answer"] == case["text"].strip() or answer["answer"] == case["text"]
    assert answer["model"] == str(source)
    monkeypatch.setattr("sys.stdin", io.StringIO(question.replace("\n", " ") + "\n"))
    assert cli.main(["chat", str(source), "--image", image, *EXACT]) == 0
    assert capsys.readouterr().out.strip() and len(conversions) == 1


def test_what_can_be_refused_is_refused_before_the_conversion(source, conversions, tmp_path, capsys):
    make_image().save(tmp_path / "image.png")
    for argv in (
        ["ask", str(source), "missing.png", "What?"],
        ["chat", str(source), "--image", "missing.png"],
        ["ask", str(source), str(tmp_path / "image.png"), "What? <image> <image>"],
    ):
        assert cli.main(argv) == 2
    for options in ({"device": "toaster"}, {"dtype": "int3"}):
        with pytest.raises(ConvLlavaError):
            load(source, **options)
    assert not conversions


@pytest.mark.slow
def test_bench_takes_an_original(source, conversions):
    from convllava_hf.profiling.profiler import profile_model

    results = profile_model(source, sizes=[(128, 128)], new_tokens=2, repeats=1, device="cpu", dtype="float32")
    assert results["model"] == str(source) and results["answers"] and len(conversions) == 1


def test_eval_takes_an_original(source, conversions, tmp_path, capsys):
    pytest.importorskip("datasets")
    pytest.importorskip("rapidfuzz")
    from helpers.benchmark_data import make

    data = make("pope", tmp_path / "data", samples=4)
    argv = ["eval", str(source), "--benchmark", "pope", "--data", str(data), "--output", str(tmp_path / "out")]
    for _ in range(2):  # the second goes on with the first one's run
        assert cli.main([*argv, "--device", "cpu", "--dtype", "float32", "--limit", "2", "--json"]) == 0
        (record,) = json.loads(capsys.readouterr().out)
        assert record["samples"] == 2
    assert len(conversions) == 1
    (run,) = (tmp_path / "out").glob("*/run.json")
    assert json.loads(run.read_text())["model"]["name"] == "source"


def test_the_page_takes_an_original(source, conversions, monkeypatch):
    pytest.importorskip("gradio")
    from convllava_hf.demo import serving

    shown = []

    @contextlib.contextmanager
    def page_of(assistant, name, **options):
        shown.append((assistant.model.config.model_type, name))
        yield "http://localhost"

    monkeypatch.setattr(serving, "page_of", page_of)
    monkeypatch.setattr(serving, "_wait_for_the_end", lambda: None)
    serving.serve(str(source), device="cpu", dtype="float32")
    assert shown == [("convllava", "source")] and len(conversions) == 1


@pytest.mark.slow
def test_two_processes_at_once_convert_once(source, folder):
    script = """
    from convllava_hf.convert import checkpoint
    from convllava_hf.convert.cache import converted_checkpoint
    from convllava_hf.inference.loading import load_processor
    made, convert = [], checkpoint.convert_checkpoint
    checkpoint.convert_checkpoint = lambda *args, **kwargs: made.append(args[0]) or convert(*args, **kwargs)
    found = converted_checkpoint(values["source"])
    load_processor(found)
    result = [found, len(made)]
    """
    options = {"package": True, "env": {CACHE_VARIABLE: str(folder)}, "source": source}
    with ThreadPoolExecutor(2) as pool:
        first, second = pool.map(lambda _: run_fresh(script, **options), range(2))
    assert first[0] == second[0] and first[1] + second[1] == 1


def test_data_check_asks_to_convert_first(source, conversions, tmp_path, capsys):
    (tmp_path / "data.json").write_text("[]")
    assert cli.main(["data", "check", str(tmp_path / "data.json"), "--model", str(source)]) == 2
    assert "convllava convert" in capsys.readouterr().err and not conversions
