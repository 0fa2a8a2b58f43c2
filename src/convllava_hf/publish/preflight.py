"""The checks before anything leaves the machine: the files themselves, and whether somebody else can use them."""

import json
import logging
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from ..errors import ConvLlavaError
from ..modeling import modeling_convllava
from ..utils.atomic import temporary_folder
from . import smoke_test
from .staging import ADAPTER, CARD, StagedRepo


logger = logging.getLogger(__name__)

# https://huggingface.co/docs/hub/storage-limits: 50 GB is the most that a file may have, and 100 files what a commit
# should have. An image or a text beyond these sizes is no card's.
MAX_FILE_BYTES = 50 * 10**9
MAX_FILES = 100
MAX_TEXT_BYTES = 10 * 2**20

_SECRETS = {
    "a token of the Hub": r"\b(hf|api_org)_[A-Za-z0-9]{30,}\b",
    "a token of GitHub": r"\b(gh[pousr]_[A-Za-z0-9]{36}|github_pat_\w{60,})",
    "a key of OpenAI or Anthropic": r"\bsk-[A-Za-z0-9_-]{32,}",
    "a key of AWS": r"\b(AKIA|ASIA)[0-9A-Z]{16}\b",
    "a key of Google": r"\bAIza[0-9A-Za-z_-]{35}\b",
    "a token of Slack": r"\bxox[abprs]-[0-9A-Za-z-]{20,}",
    "a private key": r"-----BEGIN [A-Z ]*PRIVATE KEY-----",
}
_HOME = re.compile(
    r"(?<![\w.:/])(/(?:home|Users|root|mnt|scratch|gpfs|lustre|workspace)/[\w.-]+|[A-Za-z]:\\+Users\\+\w+)"
)
_PATH = re.compile(r"(/|~/)[\w.-]+/[\w.-]|[A-Za-z]:[\\/]\w|\\\\\w|file:")
_BINARY = (".safetensors", ".model", ".jpg", ".png")
# A vocabulary holds what its corpus held, paths too; no person wrote it.
_VOCABULARIES = ("tokenizer.json", "vocab.json", "merges.txt")
_OPTIMIZER = re.compile(r"(^|\.)(exp_avg|exp_avg_sq|momentum_buffer|optimizer|master_param)(\.|$)")


@dataclass(frozen=True)
class WidgetExample:
    """An image and a question that the model is asked before it is published.

    `name`: the image's path among the published files, or `None` for one that is made for the check only.
    """

    question: str
    name: str | None = None


def check_files(staged: StagedRepo, token: str | None = None) -> None:
    """Looks for what must not be published, and for what the Hub would not take.

    Args:
        token: the one in use, which is looked for too.

    Raises:
        ConvLlavaError: naming all that was found, never the secret itself.
    """
    faults = [*_size_faults(staged)]
    for name in staged.names():
        path = staged.folder / name
        if path.suffix == ".safetensors":
            faults += _weight_faults(path, name)
        elif path.suffix not in _BINARY and name not in _VOCABULARIES:
            faults += _text_faults(path, name, token)
    if faults:
        raise ConvLlavaError(
            f"Not published, since {'; '.join(faults)}. Take it out of {staged.source} and try again."
        )


def run_smoke_test(
    staged: StagedRepo, shown: list[WidgetExample], token: str | None = None, trust_remote_code: bool = False
) -> list[str]:
    """The model's answers in a fresh process, from only the staged folder and without this package.

    Args:
        shown: what to ask; with nothing, an image made for it.
        token: for an adapter whose base model is private or gated, to download it with.
        trust_remote_code: whether an adapter's base model is loaded by the code in its own repository; without it, by
            this package's.

    Raises:
        ConvLlavaError: it cannot be loaded or does not answer; the message ends with what the process said.
    """
    values: dict[str, Any] = {
        "folder": str(staged.folder),
        "base_model": staged.base_model,
        "base_code": None if trust_remote_code else str(Path(modeling_convllava.__file__).parent),
        "shown": [
            {"question": one.question, "image": str(staged.folder / one.name) if one.name else None}
            for one in shown or [WidgetExample("What is in the image?")]
        ],
    }
    with temporary_folder("convllava-smoke-test-") as home:
        values["result"] = str(home / "result.json")
        request = home / "request.json"
        request.write_text(json.dumps(values), encoding="utf-8")
        process = subprocess.run(
            [sys.executable, smoke_test.__file__, str(request)],
            cwd=home,
            env=_smoke_test_environment(home, staged.base_model is not None, token),
            capture_output=True,
            text=True,
            errors="replace",
        )
        if process.returncode == 0:
            return json.loads(Path(values["result"]).read_text(encoding="utf-8"))
    said = [line for line in process.stderr.splitlines() if line.strip()][-12:] or ["it said nothing"]
    reason = f"killed by signal {-process.returncode}: out of memory?" if process.returncode < 0 else said[-1]
    logger.info("The fresh process said:\n%s", "\n".join(said))
    raise ConvLlavaError(
        "Not published, since in a fresh process, without convllava_hf and with trust_remote_code, the model does "
        f"not load and answer: {reason}"
    )


def _smoke_test_environment(home: Path, online: bool, token: str | None) -> dict[str, str]:
    """As somebody else has it: no token but for the base model's download, no modules from earlier loads.

    A full model must need nothing but its own files, so the Hub is out of reach for it.
    """
    ours = ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "HF_MODULES_CACHE", "HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE")
    environment = {name: value for name, value in os.environ.items() if name not in ours}
    environment |= {"HF_MODULES_CACHE": str(home / "modules"), "TOKENIZERS_PARALLELISM": "false"}
    if not online:
        environment |= {"HF_HUB_OFFLINE": "1", "HF_TOKEN_PATH": str(home / "none")}
    elif token:
        environment["HF_TOKEN"] = token
    return environment


def _size_faults(staged: StagedRepo) -> Iterator[str]:
    names = staged.names()
    if len(names) > MAX_FILES:
        yield f"there are {len(names)} files, more than the {MAX_FILES} of one commit (larger shards make fewer)"
    for name in names:
        size = staged.size(name)
        if size > MAX_FILE_BYTES:
            yield f"{name} has {size / 1e9:.1f} GB, more than the Hub's {MAX_FILE_BYTES // 10**9} GB for a file"
        elif size == 0:
            yield f"{name} is empty"
        elif name == CARD and size > MAX_TEXT_BYTES:
            yield f"the card has {size / 2**20:.0f} MiB"


def _weight_faults(path: Path, name: str) -> Iterator[str]:
    try:
        with safe_open(path, framework="pt") as handle:
            keys = list(handle.keys())
            notes = " ".join((handle.metadata() or {}).values())
    except (SafetensorError, OSError) as error:
        yield f"{name} cannot be read as safetensors ({error}): is it complete?"
        return
    if found := [key for key in keys if _OPTIMIZER.search(key)]:
        yield f"{name} holds an optimizer's state ({found[0]})"
    if path.name == ADAPTER and (strange := [key for key in keys if not key.startswith("base_model.")]):
        yield f"{name} holds {strange[0]}, which is no adapter's weight"
    if _HOME.search(notes):
        yield f"the header of {name} holds an absolute path"


def _text_faults(path: Path, name: str, token: str | None) -> Iterator[str]:
    text = path.read_text(encoding="utf-8", errors="replace")
    for kind, pattern in _SECRETS.items():
        if match := re.search(pattern, text):
            yield f"{name} holds what looks like {kind} in line {_line(text, match.start())}"
    if token and token in text:
        yield f"{name} holds the token in use in line {_line(text, text.index(token))}"
    if match := _HOME.search(text):
        yield f"{name} holds the absolute path {match[1]}... in line {_line(text, match.start())}"
    elif path.suffix == ".json":
        for key, value in _strings(json.loads(text)):
            if _PATH.match(value):
                yield f"{name} holds the absolute path {value[:60]!r} under {key}"


def _strings(value: Any, key: str = "") -> Iterator[tuple[str, str]]:
    """All texts in a JSON value, each with the keys that lead to it."""
    if isinstance(value, str):
        yield key, value
    elif isinstance(value, dict):
        for name, entry in value.items():
            yield from _strings(entry, f"{key}.{name}" if key else str(name))
    elif isinstance(value, list):
        for entry in value:
            yield from _strings(entry, key)


def _line(text: str, position: int) -> int:
    return text.count("\n", 0, position) + 1
