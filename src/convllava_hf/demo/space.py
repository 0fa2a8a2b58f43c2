"""The web page as a Space on the Hub: the package's own files, with what a Space needs round them."""

import importlib.metadata
import importlib.resources
import re

from huggingface_hub.utils import HFValidationError, validate_repo_id

from ..errors import ConvLlavaError


GRADIO_VERSION = "6.31.0"  # the newest that the tests have seen
_PYTHON_VERSION = "3.11"
# What the page imports, and nothing else of the package.
_PACKAGE = (
    "__init__.py",
    "registration.py",
    "atomic.py",
    "boxes.py",
    "checkpoint_errors.py",
    "errors.py",
    "inference.py",
    "interrupts.py",
    "loading.py",
    "device_memory.py",
    "vision_backends.py",
    "prompt_cache.py",
    "image_options.py",
    "texts.py",
    "trust.py",
)
_MODELING = (
    "__init__.py",
    "configuration_convllava.py",
    "image_processing_convllava.py",
    "image_utils_convllava.py",
    "modeling_convllava.py",
    "processing_convllava.py",
)
_README = """\
---
title: {title}
emoji: 🔎
colorFrom: blue
colorTo: green
sdk: gradio
sdk_version: {gradio}
python_version: '{python}'
app_file: app.py
models:
- {model}
suggested_hardware: {hardware}
short_description: Ask a ConvLLaVA about images
---

# {title}

Drop an image, ask about it, and follow up. The model is [{model}](https://huggingface.co/{model}).

The page is `convllava demo` of the package convllava-hf, whose files are in `convllava_hf/`. A model that is not
public needs a token that can read it, as the Space's secret `HF_TOKEN`.
"""
_APP = '''\
"""The web page of {model}. The environment variable CONVLLAVA_MODEL names another model."""

import os

from convllava_hf.demo import serve


port = int(os.environ.get("GRADIO_SERVER_PORT", "7860"))
serve(os.environ.get("CONVLLAVA_MODEL", "{model}"), host="0.0.0.0", port=port)
'''


def space_files(model_id: str, hardware: str = "a10g-small") -> dict[str, str]:
    """The files of a Space that shows a model: name in the repository, and content.

    Args:
        model_id: the model on the Hub, `owner/name`.
        hardware: what the Hub suggests to whoever copies the Space; the default holds 7 B parameters in bfloat16.

    Raises:
        ConvLlavaError: `model_id` is no id of the Hub.
    """
    try:
        validate_repo_id(model_id)
        valid = re.fullmatch(r"[\w.-]+/[\w.-]+", model_id, re.ASCII) is not None
    except HFValidationError:
        valid = False
    if not valid:
        raise ConvLlavaError(f"{model_id!r} is no model's id on the Hub: a Space needs one of the form owner/name.")
    title = model_id.partition("/")[2]
    files = {
        "README.md": _README.format(
            title=title, gradio=GRADIO_VERSION, python=_PYTHON_VERSION, model=model_id, hardware=hardware
        ),
        "app.py": _APP.format(model=model_id),
        "requirements.txt": "\n".join(_requirements()) + "\n",
    }
    package = importlib.resources.files(__package__.partition(".")[0])
    sources = {f"convllava_hf/{name}": package / name for name in _PACKAGE}
    demo = importlib.resources.files(__package__)
    sources |= {f"convllava_hf/demo/{file.name}": file for file in demo.iterdir() if file.name.endswith(".py")}
    modeling = importlib.resources.files(f"{package.name}.modeling")
    sources |= {f"convllava_hf/modeling/{name}": modeling / name for name in _MODELING}
    return files | {name: source.read_text(encoding="utf-8") for name, source in sorted(sources.items())}


def _requirements() -> list[str]:
    """What the package itself requires; the Hub installs gradio by the README's `sdk_version`."""
    required = importlib.metadata.requires("convllava-hf") or []
    return sorted(line for line in required if not re.search(r";.*\bextra\b", line))
