"""Whether Python code that comes with a checkpoint may run: decided here, for every command and every recipe.

ConvLLaVA's classes are this package's, so a checkpoint needs no code to be loaded. transformers' Auto classes run code
of a checkpoint in two cases: with `trust_remote_code=True`, and, where it is not given, after asking on the terminal.
So everything that loads from a checkpoint passes it explicitly, and only where the user has asked for it
(`--trust-remote-code`, or `trust_remote_code: true` in a recipe) do the Auto classes come in.
"""

import json
import logging
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from transformers.utils import cached_file

from ..errors import ConvLlavaError


logger = logging.getLogger(__name__)

AUTO_MAP_FILES = ("config.json", "processor_config.json", "preprocessor_config.json", "tokenizer_config.json")
_OWN_MODULES = {f"{name}_convllava" for name in ("configuration", "modeling", "image_processing", "processing")}
_GENERATE = "custom_generate/generate.py"
_FLAG = "--trust-remote-code"


def from_checkpoint(
    native: Any, auto: Any, source: str | os.PathLike, *, trust_remote_code: bool = False, **options: Any
) -> Any:
    """What a checkpoint holds, by this package's class, or, with the code trusted, by what the checkpoint names.

    Args:
        native: this package's class.
        auto: transformers' Auto class of the same kind. It takes this package's classes as well, except where the
            checkpoint names others.
        source: folder of a checkpoint or its id on the Hub.
        options: of `from_pretrained`.
    """
    chosen = auto if trust_remote_code else native
    return chosen.from_pretrained(source, trust_remote_code=trust_remote_code, **options)


def foreign_code(source: str | os.PathLike, revision: str | None = None) -> list[str]:
    """The classes that a checkpoint's files name in code that is not this package's, each with its file.

    Nothing is said about a module of our own name: it is never run without being trusted, and need not be.
    """
    found: dict[str, None] = {}
    for name in AUTO_MAP_FILES:
        for reference in references(_read_json(source, name, revision)):
            if reference.rpartition("--")[2].partition(".")[0] not in _OWN_MODULES:
                found[f"{reference} in {name}"] = None
    return list(found)


def check_code(name: str, config: Mapping[str, Any], trust_remote_code: bool = False, never: bool = False) -> None:
    """Refuses code that transformers would run even without `trust_remote_code`.

    That is an attention which is a kernel on the Hub, and, with some versions of transformers, a function in the
    checkpoint's folder that takes the place of `generate`.

    Args:
        never: whether the command has no flag by which it would be run.

    Raises:
        ConvLlavaError: names the code.
    """
    if trust_remote_code:
        return
    unless = "" if never else f" unless {_FLAG} is given. Read it first, or go without"
    if (Path(name) / _GENERATE).is_file():
        raise ConvLlavaError(
            f"{name!r} brings code in the place of generate, {_GENERATE}, which is not run{unless}: delete it."
        )
    for part in (config, *(value for value in config.values() if isinstance(value, Mapping))):
        for key in ("attn_implementation", "_attn_implementation", "_attn_implementation_internal"):
            if "/" in str(part.get(key)):
                raise ConvLlavaError(
                    f"config.json of {name!r} sets {key} to {part[key]!r}, which is code on the Hub and is not "
                    f"run{unless}: take the key out of config.json."
                )


def explain_refusal(error: Exception, source: str | os.PathLike, revision: str | None = None) -> str | None:
    """Why a checkpoint did not load without its code, where that is the reason."""
    if "trust_remote_code" not in str(error) or not (found := foreign_code(source, revision)):
        return None
    return (
        f"The checkpoint {os.fspath(source)!r} needs code of its own ({'; '.join(found)}), which is not run unless "
        f"{_FLAG} is given. Read that code first: it can do anything that you can."
    )


def warn_about_foreign_code(source: str | os.PathLike, revision: str | None = None) -> None:
    """Warns that a checkpoint's code was not run, where the checkpoint has loaded without it."""
    if found := foreign_code(source, revision):
        logger.warning(
            "The checkpoint %s names code of its own, which was not run (%s): this package's classes take its place. "
            "%s runs it.",
            os.fspath(source),
            "; ".join(found),
            _FLAG,
        )


def pickled_code(source: str | os.PathLike) -> str:
    """The message for a file that torch refused as more than tensors; torch's own advises to read it anyway."""
    return (
        f"A PyTorch file of {os.fspath(source)!r} holds more than tensors and numbers, which could be code that runs "
        "when it is read, so it was not read. Ask its author for safetensors."
    )


def references(value: Any) -> Iterator[str]:
    """Everything that `auto_map` names, at any depth: processor_config.json holds the image processor's too."""
    if not isinstance(value, Mapping):
        return
    for key, entry in value.items():
        if key == "auto_map":
            entries = entry.values() if isinstance(entry, Mapping) else [entry]
            for one in entries:
                yield from (name for name in (one if isinstance(one, list) else [one]) if isinstance(name, str))
        else:
            yield from references(entry)


def _read_json(source: str | os.PathLike, name: str, revision: str | None) -> Any:
    """A JSON file of a checkpoint; `None` if it is missing or broken, which others report."""
    if Path(source).is_dir():
        path = Path(source) / name
    else:
        missing = {f"_raise_exceptions_for_{what}": False for what in ("missing_entries", "connection_errors")}
        found = cached_file(os.fspath(source), name, revision=revision, **missing)
        if found is None:
            return None
        path = Path(found)
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return None
