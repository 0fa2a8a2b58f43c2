"""Checkpoints with code in each place where transformers looks for it. What runs writes its name into a file."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import torch


class Hostile:
    """A copy of a checkpoint, and the file that its code writes to.

    Args:
        folder: the copy to make.
        source: a whole checkpoint.
        marker: the file that code which runs writes to.
    """

    def __init__(self, folder: Path, source: Path, marker: Path):
        shutil.copytree(source, folder)
        self.folder, self.marker = folder, marker

    @property
    def ran(self) -> str:
        """The names of what ran."""
        return self.marker.read_text() if self.marker.exists() else ""

    def code(self, name: str) -> str:
        """A line of Python that leaves a trace."""
        return f"open({str(self.marker)!r}, 'a').write({name + '; '!r})\n"

    def write_code(self, module: str, body: str = "") -> None:
        path = self.folder / f"{module}.py"
        path.parent.mkdir(exist_ok=True)
        path.write_text(self.code(module) + body)

    def change(self, name: str, **values) -> None:
        path = self.folder / name
        content = json.loads(path.read_text()) if path.is_file() else {}
        path.write_text(json.dumps({**content, **values}))

    def auto_map(self, name: str) -> dict:
        path = self.folder / name
        return json.loads(path.read_text()).get("auto_map", {}) if path.is_file() else {}

    def pickle(self, name: str) -> None:
        """A file that runs code when it is unpickled, as torch writes it."""
        torch.save(_Runs(self.code(name)), self.folder / name)


class _Runs:
    def __init__(self, code: str):
        self.code = code

    def __reduce__(self):
        return exec, (self.code,)


_TOKENIZER = "from transformers import PreTrainedTokenizerFast\nclass Evil(PreTrainedTokenizerFast):\n    pass\n"


def own_code(one: Hostile) -> None:
    """The files that come with every checkpoint, changed."""
    for path in sorted(one.folder.glob("*.py")):
        one.write_code(path.stem, path.read_text())


def auto_maps(one: Hostile) -> None:
    """Other modules under all names that the files may map, beside the names of classes that transformers has."""
    names = (
        "AutoConfig",
        "AutoModel",
        "AutoModelForImageTextToText",
        "AutoModelForVision2Seq",
        "AutoModelForCausalLM",
    )
    everywhere = {
        name: "evil.Evil" for name in (*names, "AutoProcessor", "AutoImageProcessor", "AutoFeatureExtractor")
    }
    one.write_code("evil", _TOKENIZER)
    for name in ("config.json", "processor_config.json", "preprocessor_config.json", "generation_config.json"):
        one.change(name, auto_map=everywhere)
    one.change("tokenizer_config.json", auto_map={**everywhere, "AutoTokenizer": [None, "evil.Evil"]})
    config = json.loads((one.folder / "config.json").read_text())
    for part in ("text_config", "vision_config"):
        one.change("config.json", **{part: {**config[part], "auto_map": everywhere}})
    processor = json.loads((one.folder / "processor_config.json").read_text())
    nested = {**processor.get("image_processor", {}), "auto_map": everywhere}
    one.change("processor_config.json", image_processor=nested)


def tokenizer(one: Hostile) -> None:
    """A tokenizer's class that only the checkpoint has: transformers asks on the terminal whether to run it."""
    one.write_code("evil_tokenizer", _TOKENIZER)
    mapped = {**one.auto_map("tokenizer_config.json"), "AutoTokenizer": [None, "evil_tokenizer.Evil"]}
    one.change("tokenizer_config.json", tokenizer_class="Evil", auto_map=mapped)


def processor(one: Hostile) -> None:
    """A processor's and an image processor's class that only the checkpoint has."""
    one.write_code("evil_processor", "class Evil:\n    pass\n")
    mapped = {"AutoProcessor": "evil_processor.Evil", "AutoImageProcessor": "evil_processor.Evil"}
    for name in ("processor_config.json", "preprocessor_config.json", "tokenizer_config.json"):
        one.change(name, processor_class="Evil", auto_map=mapped)
    one.change("preprocessor_config.json", image_processor_type="Evil")


def generation(one: Hostile) -> None:
    """A function in the place of `generate`, and a way to decode that is code on the Hub."""
    one.write_code("custom_generate/generate", "def generate(model, *args, **kwargs):\n    raise SystemExit(3)\n")
    one.change("generation_config.json", custom_generate=str(one.folder), trust_remote_code=True)


def template(one: Hostile) -> None:
    """A chat template that leaves jinja's sandbox where there is none."""
    command = f"echo template >> {one.marker}"
    (one.folder / "chat_template.jinja").write_text(
        "{{ cycler.__init__.__globals__.os.system('" + command + "') }}{{ ''.__class__.__mro__[1].__subclasses__() }}"
    )


def weights(one: Hostile) -> None:
    """Pickles in the place of weights, and beside them."""
    (one.folder / "model.safetensors").unlink()
    one.pickle("pytorch_model.bin")
    one.pickle("training_args.bin")


def config(one: Hostile) -> None:
    """A model of another type, by the checkpoint's own classes."""
    one.write_code(
        "evil_config", "from transformers import PretrainedConfig\nclass Evil(PretrainedConfig):\n    pass\n"
    )
    names = ("AutoConfig", "AutoModel", "AutoModelForImageTextToText", "AutoProcessor")
    one.change("config.json", model_type="evil", auto_map={name: "evil_config.Evil" for name in names})


def attention(one: Hostile) -> None:
    """An attention that is a kernel on the Hub."""
    one.change("config.json", attn_implementation="evil/kernel", _attn_implementation="evil/kernel")


def adapter(one: Hostile) -> None:
    """An adapter beside the model, whose base model is hostile too."""
    base = one.folder / "base"
    base.mkdir()
    for path in one.folder.iterdir():
        if path.is_file():
            shutil.copy(path, base / path.name)
    (base / "modeling_convllava.py").write_text(one.code("base"))
    mapping = {"parent_library": "evil_adapter", "base_model_class": "Evil"}
    one.change("adapter_config.json", peft_type="LORA", base_model_name_or_path=str(base), auto_mapping=mapping, r=1)
    one.write_code("evil_adapter")
    one.pickle("adapter_model.bin")


PLACES: dict[str, Callable[[Hostile], None]] = {
    one.__name__: one
    for one in (
        own_code,
        auto_maps,
        tokenizer,
        processor,
        generation,
        template,
        weights,
        config,
        attention,
        adapter,
    )
}
