"""Which files of a checkpoint are published: a folder of their own, next to the one that they come from."""

import json
import logging
import os
import shutil
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from importlib import resources
from pathlib import Path
from typing import Any

from transformers.dynamic_module_utils import get_relative_import_files

from ..convert.checkpoint_files import Weights
from ..convert.writing import ShardWriter, parse_size
from ..errors import ConvLlavaError
from ..inference.loading import PROCESSOR_FILES
from ..inference.trust import AUTO_MAP_FILES, references
from ..modeling.configuration_convllava import ConvLlavaConfig
from ..modeling.modeling_convllava import AUTO_MAP
from ..training_record import RECORD_FILE
from ..utils.atomic import naming
from ..utils.json_files import read_json_object, write_json
from ..utils.links import check_links, file_inside
from ..utils.repo_ids import is_repo_id


logger = logging.getLogger(__name__)

CARD = "README.md"
MAX_SHARD_SIZE = "5GB"
INDEX = "model.safetensors.index.json"
ADAPTER = "adapter_model.safetensors"
# What a checkpoint may bring. Only what is named here leaves the machine: optimizer states, pickled arguments, logs
# and other files in a folder of training never do.
_SETTINGS = (
    "config.json",
    "generation_config.json",
    "adapter_config.json",
    *PROCESSOR_FILES,
    "processor_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "tokenizer.model",
    "vocab.json",
    "merges.txt",
)
_BESIDES = (RECORD_FILE, "loss.png", "LICENSE*", "NOTICE*")
_ENDPOINT = ("handler.py", "requirements.txt")
_WEIGHTS = ("*.safetensors", "*.safetensors.index.json")
# What decides how a repository loads. Files of these names that an earlier push left and this one lacks are removed
# with it: model.safetensors next to the shards of a newer push would be what readers get.
LOADED = (
    *_SETTINGS,
    *_ENDPOINT,
    "*_convllava.py",
    "model.safetensors",
    "model-?????-of-?????.safetensors",
    INDEX,
    ADAPTER,
    "adapter_model.bin",
    "pytorch_model.bin",
    "pytorch_model-?????-of-?????.bin",
    "pytorch_model.bin.index.json",
)


@dataclass
class StagedRepo:
    """A folder with exactly the files to publish, large ones as links to the checkpoint's own.

    `left_out`: names in the checkpoint that are not published. `refused`: why the folder must not be published as it
    is, though what it needs to load is there: each names a link out of it, or something that is no file. `base_model`:
    of an adapter, the id of the model that it belongs to; `None` for a full model.
    """

    folder: Path
    source: Path
    base_model: str | None = None
    left_out: list[str] = field(default_factory=list)
    refused: list[str] = field(default_factory=list)

    def names(self) -> list[str]:
        """The files' paths in the repository, sorted."""
        return sorted(path.relative_to(self.folder).as_posix() for path in self.folder.rglob("*") if path.is_file())

    def size(self, name: str) -> int:
        """Bytes of one of them."""
        return (self.folder / name).stat().st_size

    def json(self, name: str) -> dict[str, Any]:
        """The object in one of them; empty where it is missing."""
        path = self.folder / name
        return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}


def stage(
    source: str | os.PathLike,
    folder: Path,
    *,
    base_model: str | None = None,
    max_shard_size: int | str = MAX_SHARD_SIZE,
    trust_remote_code: bool = False,
) -> StagedRepo:
    """Lays the files to publish into `folder`.

    Args:
        source: the folder of a full model or of a LoRA adapter.
        folder: an empty folder.
        base_model: for an adapter, the id on the Hub of the model that it was trained on; default: what its
            adapter_config.json names, if that is an id.
        max_shard_size: a larger file of weights is rewritten in shards of at most this size.
        trust_remote_code: whether code in `source` that is not this package's is published, and run in the check.

    Raises:
        ConvLlavaError: `source` is no ConvLLaVA checkpoint or adapter, lacks what others need to load it, names code
            that is not this package's, or what it needs is a link that leads out of it (see `links`).
    """
    source = Path(source).expanduser()
    if not source.is_dir():
        raise ConvLlavaError(f"There is no folder {str(source)!r}: push takes the folder of a checkpoint.")
    check_links(source, (*_SETTINGS, *_WEIGHTS, "*.py"))
    is_adapter = (source / "adapter_config.json").is_file()
    staged = StagedRepo(folder, source, _base_of(source, base_model) if is_adapter else None)
    if missing := [name for name in PROCESSOR_FILES if not (source / name).is_file()]:
        raise ConvLlavaError(
            f"{source} lacks the processor's {', '.join(missing)}, without which nobody can use the model. Save the "
            f'processor along with it: AutoProcessor.from_pretrained(...).save_pretrained("{source}")'
        )
    for path in sorted(source.iterdir()):
        if path.is_file() and any(fnmatchcase(path.name, pattern) for pattern in _SETTINGS):
            _copy(file_inside(path, source), folder / path.name)
    _stage_besides(staged)
    if is_adapter:
        _stage_adapter(staged)
    else:
        _stage_model(staged, parse_size(max_shard_size))
    _stage_code(staged, trust_remote_code)
    for path in sorted(folder.glob("*.json")):
        _tidy(path, staged.base_model)
    taken = {*staged.names(), *_named_shards(source), INDEX}
    staged.left_out = sorted(path.name + "/" * path.is_dir() for path in source.iterdir() if path.name not in taken)
    return staged


def _stage_besides(staged: StagedRepo) -> None:
    """What a checkpoint can do without; what is no file of its own is left out and noted in `refused`."""
    for path in sorted(staged.source.iterdir()):
        if any(fnmatchcase(path.name, pattern) for pattern in _BESIDES) and (path.is_symlink() or not path.is_dir()):
            try:
                _copy(file_inside(path, staged.source), staged.folder / path.name)
            except ConvLlavaError as error:
                staged.refused.append(str(error))


def is_hub_id(name: str) -> bool:
    """Whether `name` has the form owner/name of an id on the Hub, and is no folder here."""
    return is_repo_id(name) and not Path(name).exists()


def _base_of(source: Path, base_model: str | None) -> str:
    named = read_json_object(source / "adapter_config.json", f"The adapter {source}").get("base_model_name_or_path")
    base = base_model or named
    if not base or not is_hub_id(str(base)):
        raise ConvLlavaError(
            f"The adapter in {source} was trained on {str(named)!r}, which others cannot load: name the id on the Hub "
            "(owner/name) of that model with --base-model, and push the model itself first if it is not there yet."
        )
    return str(base)


def _stage_adapter(staged: StagedRepo) -> None:
    weights = staged.source / ADAPTER
    if not weights.is_file():
        raise ConvLlavaError(f"{staged.source} holds no {ADAPTER}: save the adapter as safetensors.")
    _link(file_inside(weights, staged.source), staged.folder / ADAPTER)
    (staged.folder / "config.json").unlink(missing_ok=True)  # next to an adapter it would hide the base model's


def _stage_model(staged: StagedRepo, max_shard_bytes: int) -> None:
    config = read_json_object(staged.source / "config.json", f"The checkpoint {staged.source}")
    if config.get("model_type") != ConvLlavaConfig.model_type:
        raise ConvLlavaError(
            f"{staged.source} is no ConvLLaVA checkpoint: its config.json has the model_type "
            f"{config.get('model_type')!r}. An original checkpoint is converted first: convllava convert."
        )
    names = _named_shards(staged.source)
    if not names:
        raise ConvLlavaError(
            f"{staged.source} holds no model.safetensors and no {INDEX}: save the model with save_pretrained, which "
            "writes safetensors."
        )
    if missing := [name for name in names if not (staged.source / name).is_file()]:
        raise ConvLlavaError(f"{staged.source} is incomplete: {INDEX} names {', '.join(missing)}, which is missing.")
    if any((staged.source / name).stat().st_size > max_shard_bytes for name in names):
        _write_shards(staged, max_shard_bytes)
        return
    for name in names:
        _link(file_inside(staged.source / name, staged.source), staged.folder / name)
    if (staged.source / INDEX).is_file() and names != ["model.safetensors"]:
        _copy(file_inside(staged.source / INDEX, staged.source), staged.folder / INDEX)


def _named_shards(source: Path) -> list[str]:
    """The files of weights that a reader of the folder takes: model.safetensors goes before an index."""
    if (source / "model.safetensors").is_file():
        return ["model.safetensors"]
    if not (source / INDEX).is_file():
        return []
    weight_map = read_json_object(source / INDEX, f"The checkpoint {source}").get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise ConvLlavaError(f"{source / INDEX} has no weight_map.")
    names = sorted(set(weight_map.values()))
    if outside := [name for name in names if Path(name).name != name]:
        raise ConvLlavaError(f"{source / INDEX} names {outside[0]!r}, which is not a file next to it.")
    return names


def _write_shards(staged: StagedRepo, max_shard_bytes: int) -> None:
    """The same weights in smaller files, tensor by tensor: memory holds one at a time."""
    weights = Weights(staged.source, "The checkpoint")
    names = list(weights)
    writer = ShardWriter(
        staged.folder, {name: (weights.shape(name), weights.dtypes[name]) for name in names}, max_shard_bytes
    )
    try:
        for name, tensor in weights.tensors(names):
            writer.write(name, tensor)
        writer.finish()
    finally:
        writer.close()


def _link(source: Path, target: Path) -> None:
    """A link instead of gigabytes; a copy where the file system has none."""
    try:
        target.symlink_to(source.resolve())
    except (OSError, NotImplementedError):
        _copy(source, target)


def _copy(source: Path, target: Path) -> None:
    with naming(target):  # a full disk is not the fault of the file that is read
        shutil.copyfile(source, target)


def _stage_code(staged: StagedRepo, trusted: bool) -> None:
    """The code that `auto_map` names: this package's, or with `trusted` the checkpoint's own where it is complete.

    What is staged is run by the check, so nobody else's code may come in unasked. handler.py and requirements.txt are
    this package's.
    """
    package = resources.files("convllava_hf.modeling")
    named = {reference.rpartition("--")[2].partition(".")[0] for reference in _references(staged)}
    foreign = sorted(module for module in named if not package.joinpath(f"{module}.py").is_file())
    if foreign and not trusted:
        raise ConvLlavaError(
            f"{staged.source} names code that is not this package's ({', '.join(foreign)}.py), which push would run "
            "and publish. Read it, then give --trust-remote-code; or take it out of auto_map in the JSON files."
        )
    own = _own_code(staged.source, named)
    if trusted and own and all(path.is_file() for path in own):
        for path in own:
            _copy(file_inside(path, staged.source), staged.folder / path.name)
    elif foreign:
        raise ConvLlavaError(
            f"{staged.source} needs the code {', '.join(foreign)}.py, which is neither in it nor in this package."
        )
    else:
        if changed := sorted(path.name for path in own if path.is_file() and not _is_ours(path, package)):
            logger.warning(
                "%s in %s is not this package's code: this package's is published in its place. --trust-remote-code "
                "publishes the checkpoint's own, and runs it in the check.",
                ", ".join(changed),
                staged.source,
            )
        for entry in (Path(str(entry)) for entry in package.iterdir() if entry.name.endswith("_convllava.py")):
            for path in (entry, *map(Path, get_relative_import_files(str(entry)))):
                shutil.copyfile(path, staged.folder / path.name)
    for name in _ENDPOINT:
        content = package.joinpath(name).read_text(encoding="utf-8")
        if name == "requirements.txt" and staged.base_model:
            content += "peft>=0.17\n"
        (staged.folder / name).write_text(content, encoding="utf-8")


def _own_code(source: Path, named: set[str]) -> set[Path]:
    """The checkpoint's files of these modules and all the files that these import; some may be missing.

    Raises:
        ConvLlavaError: one is a link that leads out of the checkpoint.
    """
    own: set[Path] = set()
    for module in sorted(named):
        file = source / f"{module}.py"
        if file.exists():
            file_inside(file, source)  # before it is read: auto_map may name a file anywhere
        try:
            own |= {file, *(Path(path) for path in get_relative_import_files(str(file)))}
        except FileNotFoundError:
            own.add(file)
    return own


def _is_ours(path: Path, package) -> bool:
    ours = package.joinpath(path.name)
    return ours.is_file() and ours.read_bytes() == path.read_bytes()


def _references(staged: StagedRepo) -> list[str]:
    """All that the configuration files' `auto_map` name, such as `modeling_convllava.ConvLlavaModel`."""
    found = [] if staged.base_model else list(AUTO_MAP.values())
    return found + [reference for name in AUTO_MAP_FILES for reference in references(staged.json(name))]


def _tidy(path: Path, base_model: str | None) -> None:
    """Removes what concerns only this machine, and adds what others need."""
    if path.name in ("tokenizer.json", "vocab.json", INDEX):
        return
    before = read_json_object(path, "The checkpoint")
    after = _without_sources(before)
    if path.name == "config.json":
        after["auto_map"] = {**AUTO_MAP, **after.get("auto_map", {})}
    if path.name == "adapter_config.json":
        after["base_model_name_or_path"] = base_model
    if after != before:
        write_json(path, after)


def _without_sources(value: Any) -> Any:
    """Without the paths that it was loaded from, and with references to this repository's own code."""
    if isinstance(value, list):
        return [_without_sources(entry) for entry in value]
    if not isinstance(value, dict):
        return value
    kept = {}
    for key, entry in value.items():
        if key in ("_name_or_path", "name_or_path"):
            continue
        if key == "auto_map" and isinstance(entry, dict):
            entry = {name: _own_reference(reference) for name, reference in entry.items()}
        kept[key] = _without_sources(entry)
    return kept


def _own_reference(reference: Any) -> Any:
    """`owner/name--module.Class`, as transformers notes where code came from, as `module.Class`."""
    if isinstance(reference, list):
        return [_own_reference(entry) for entry in reference]
    return reference.rpartition("--")[2] if isinstance(reference, str) else reference
