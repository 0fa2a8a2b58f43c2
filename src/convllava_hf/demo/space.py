"""The web page as a Space on the Hub: the package's own files, with what a Space needs round them."""

import importlib.metadata
import importlib.resources
import re

from ..errors import ConvLlavaError
from ..utils.repo_ids import is_repo_id


GRADIO_VERSION = "6.31.0"  # the newest that the tests have seen
_PYTHON_VERSION = "3.11"
# What the page imports, and nothing else of the package: single files, and folders of which all modules travel.
_FILES = (
    "__init__.py",
    "boxes.py",
    "errors.py",
    "options.py",
    "registration.py",
    "modeling/__init__.py",
    "modeling/configuration_convllava.py",
    "modeling/image_processing_convllava.py",
    "modeling/image_utils_convllava.py",
    "modeling/modeling_convllava.py",
    "modeling/processing_convllava.py",
)
_FOLDERS = ("demo", "inference", "utils")
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
        ConvLlavaError: `model_id` is not an id on the Hub.
    """
    if not is_repo_id(model_id):
        raise ConvLlavaError(f"{model_id!r} is not an id on the Hub: a Space needs one of the form owner/name.")
    title = model_id.partition("/")[2]
    files = {
        "README.md": _README.format(
            title=title, gradio=GRADIO_VERSION, python=_PYTHON_VERSION, model=model_id, hardware=hardware
        ),
        "app.py": _APP.format(model=model_id),
        "requirements.txt": "\n".join(_requirements()) + "\n",
    }
    package = importlib.resources.files(__name__.partition(".")[0])
    sources = {f"convllava_hf/{name}": package / name for name in _FILES}
    for folder in _FOLDERS:
        modules = [file for file in (package / folder).iterdir() if file.name.endswith(".py")]
        sources |= {f"convllava_hf/{folder}/{file.name}": file for file in modules}
    return files | {name: source.read_text(encoding="utf-8") for name, source in sorted(sources.items())}


def _requirements() -> list[str]:
    """What the package itself requires; the Hub installs gradio by the README's `sdk_version`."""
    required = importlib.metadata.requires("convllava-hf") or []
    return sorted(line for line in required if not re.search(r";.*\bextra\b", line))
