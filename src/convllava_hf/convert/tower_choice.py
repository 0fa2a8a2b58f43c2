"""Chooses the vision tower of a converted checkpoint.

The original runs the tower that `mm_vision_tower` in config.json names: it builds the model with `delay_load=True` and
loads that tower, so tower weights in the checkpoint's own shards are never read. The released checkpoints hold such
weights all the same, and only a comparison shows whether both are equal.
"""

import logging
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import ConvNextConfig

from ..errors import ConvLlavaError
from ..training_record import portable_name
from ..utils.json_files import read_json_object
from .checkpoint_files import SMALL_FILES, UnreachableError, Weights, has_weights, indexed_weights, locate
from .keys import CONVNEXT_TABLE, ORIGINAL_TABLE, SHARDS_TOWER, SHARDS_TOWER_TABLE, TOWER, Table, rename_key
from .original import deduced_tower_config, image_settings_of, tower_config_of
from .tower_comparison import Comparison, compare_weights


logger = logging.getLogger(__name__)

SHARDS = "shards"  # what `vision_tower` is to take the tower in the checkpoint's shards
FOLDER = "vision_tower"
_WHAT = "The vision tower"
_CONFIGS = ("config.json", "preprocessor_config.json")


@dataclass(frozen=True)
class Place:
    """Where a tower may lie: a folder `inner` of a folder on disk or of a repository on the Hub.

    `name`: what the tower is called in messages and in the record.
    """

    reference: str | Path
    inner: str
    name: str

    def configs(self) -> Path:
        """The folder with the small files.

        Raises:
            UnreachableError: there is no config.json, or no such folder or repository.
        """
        folder = locate(self.reference, _WHAT, weights=(), files=self._files) / self.inner
        if not (folder / "config.json").is_file():
            raise UnreachableError(f"{_WHAT}: {folder} has no config.json.")
        return folder

    def weights(self) -> Weights:
        """Its weights, downloaded where they are not here.

        Raises:
            UnreachableError: there are none.
        """
        folder = locate(self.reference, _WHAT, weights=(self.inner,), files=self._files) / self.inner
        if not has_weights(folder):
            raise UnreachableError(f"{_WHAT}: {folder} holds no weights.")
        return Weights(folder, _WHAT)

    @property
    def _files(self) -> tuple[str, ...]:
        return SMALL_FILES if self.inner else _CONFIGS  # a checkpoint's are here already


@dataclass
class FoundTower:
    """A tower outside of the shards, as far as it was found.

    `is_inside`: whether it lies in the checkpoint's folder or repository. `folder`, `config`, `stated_size`: its
    folder, what its config.json says and the `image_size` in there; none where there is none. `weights`: none where
    they were not found or not asked for. `why_not`: what was not found, and why.
    """

    name: str
    is_inside: bool = False
    folder: Path | None = None
    config: ConvNextConfig | None = None
    stated_size: int | None = None
    weights: Weights | None = None
    why_not: str = ""


@dataclass(frozen=True)
class ChosenTower:
    """The tower to convert.

    `weights` and `table`: of a tower outside of the shards, else `None` and empty. `main_table`: reads the shards,
    with or without the tower in them. `origin`: what the training record says of it.
    """

    config: ConvNextConfig
    image_settings: dict
    weights: Weights | None
    table: Table
    main_table: Table
    origin: dict[str, Any]


def find_tower(source: str | Path, folder: Path, config: dict, asked: str | Path | None) -> FoundTower:
    """Looks for the tower outside of the shards, and downloads its weights if it may be the one to take.

    Args:
        source: the checkpoint's folder or id, as the caller named it.
        folder: the checkpoint's folder.
        config: its config.json.
        asked: a folder or Hub id that goes before all others; `"shards"` asks for the shards' tower, for which only
            the named tower's config files are looked for.

    Raises:
        ConvLlavaError: what was asked for is not there; what was found is no ConvNeXt.
    """
    if asked == SHARDS:
        _check_shards_hold_a_tower(folder)
    elif asked is not None:
        place = Place(asked, "", str(asked))
        found = _look(place)
        found.weights = place.weights()
        return found
    reasons, described = [], None
    for place in named_places(source, folder, config):
        try:
            found = _look(place)
            if asked == SHARDS and found.folder is not None:
                found.weights = _weights_at_hand(found.folder)
                return found
            described = described or found
            found.weights = place.weights()
            return found
        except UnreachableError as error:
            reasons.append(str(error))
        except ConvLlavaError as error:
            if asked == SHARDS:
                logger.warning("%s Its configuration is not used.", error)
                continue
            # It is there: another tower in its place would be a guess, perhaps only because the network has a bad day.
            raise ConvLlavaError(
                f"{error} If the checkpoint's shards hold a tower, --vision-tower {SHARDS} takes that one."
            ) from error
    found = described or FoundTower(str(config["mm_vision_tower"]))
    found.why_not = " ".join(reasons)
    return found


def named_places(source: str | Path, folder: Path, config: dict) -> Iterator[Place]:
    """Where the tower may lie that config.json names, in the order of looking.

    These are the checkpoint's folder `vision_tower/`, and what `mm_vision_tower` says: a path from the checkpoint, an
    absolute one, or an id on the Hub.
    """
    if (folder / FOLDER).is_dir():
        yield Place(source, FOLDER, f"{FOLDER}/ of the checkpoint")
    named = config["mm_vision_tower"]
    if not isinstance(named, str) or not named.strip():
        return
    if os.path.isdir(folder / named):
        inner = os.path.normpath(named)
        if os.path.isabs(inner) or inner.startswith(os.pardir):
            yield Place(folder / named, "", named)
        else:
            yield Place(source, inner, f"{inner}/ of the checkpoint")
    else:
        yield Place(named, "", named)


def choose_tower(
    found: FoundTower, folder: Path, config: dict, shards: Weights, asked: str | Path | None
) -> ChosenTower:
    """The tower to convert, after saying which one it is and whether it equals the other one.

    Args:
        found: what `find_tower` found.
        folder: the checkpoint's folder.
        config: its config.json.
        shards: the weights of its own files.
        asked: as `find_tower` takes it.

    Raises:
        ConvLlavaError: there is no tower, or its resolution is not known.
    """
    inside = [name for name in shards if name.startswith(SHARDS_TOWER)]
    from_shards = asked == SHARDS or found.weights is None
    if from_shards and not inside:
        raise ConvLlavaError(
            f"No weights of the vision tower: the checkpoint's own files in {folder} hold none"
            + (f". {found.why_not} Pass" if found.why_not else "; pass")
            + " the tower's folder or id with --vision-tower."
        )
    comparison = None
    if inside and found.weights is not None:
        comparison = compare_weights(shards, SHARDS_TOWER_TABLE, found.weights, CONVNEXT_TABLE)
    _tell(found, asked, from_shards, comparison)
    tower_config = found.config
    if tower_config is None:
        tower_config = deduced_tower_config(_shapes_in(shards, inside), "The tower in the checkpoint's shards")
        logger.warning("The vision tower's config.json is missing; its shape is deduced from its weights.")
    image_settings = image_settings_of(found.folder or folder / FOLDER, config, found.stated_size)
    tower_config.image_size = image_settings.pop("side")
    return ChosenTower(
        config=tower_config,
        image_settings=image_settings,
        weights=None if from_shards else found.weights,
        table=() if from_shards else CONVNEXT_TABLE,
        main_table=ORIGINAL_TABLE if from_shards else ((rf"^{SHARDS_TOWER}", None), *ORIGINAL_TABLE),
        origin=_origin(found, asked, from_shards, comparison),
    )


def _look(place: Place) -> FoundTower:
    folder = place.configs()
    config = read_json_object(folder / "config.json", _WHAT)
    if "model_type" not in config and "architecture" in config:
        raise UnreachableError(
            f"{_WHAT}: {folder} holds a tower that timm saved; expected one that transformers saved."
        )
    return FoundTower(place.name, bool(place.inner), folder, tower_config_of(folder), config.get("image_size"))


def _weights_at_hand(folder: Path) -> Weights | None:
    """The weights in a folder if all of them are there; nothing is downloaded just for a comparison."""
    try:
        return Weights(folder, _WHAT) if has_weights(folder) else None
    except ConvLlavaError as error:
        logger.warning("The tower in %s is not compared: %s", folder, error)
        return None


def _check_shards_hold_a_tower(folder: Path) -> None:
    """Refuses early if the index shows it; without an index `choose_tower` finds out when it has the weights."""
    names = indexed_weights(folder, "The checkpoint")
    if names is not None and not any(name.startswith(SHARDS_TOWER) for name in names):
        raise ConvLlavaError(
            f"The shards of {folder} hold no vision tower; leave out --vision-tower {SHARDS} to take the one that its "
            "config.json names."
        )


def _shapes_in(shards: Weights, names: list[str]) -> dict[str, tuple[int, ...]]:
    shapes = {}
    for name in names:
        try:
            ours = rename_key(name, SHARDS_TOWER_TABLE)
        except KeyError:
            ours = name
        if ours is not None:
            shapes[ours.removeprefix(TOWER)] = tuple(shards.shape(name))
    return shapes


def _tell(found: FoundTower, asked, from_shards: bool, comparison: Comparison | None) -> None:
    """Logs which tower is taken; a warning if the original would, or may, have used another one."""
    if comparison is not None:
        message = f"The vision towers in {found.name} and in the checkpoint's shards {comparison}."
        if comparison.identical:
            logger.info("%s Taking the one in %s.", message, "the shards" if from_shards else found.name)
        elif asked == SHARDS:
            logger.warning(
                "%s Taking the shards', as asked for; the original runs the one in %s.", message, found.name
            )
        else:
            why = "which the original runs" if asked is None else "as asked for"
            logger.warning(
                "%s Taking the one in %s, %s; --vision-tower %s takes the other.", message, found.name, why, SHARDS
            )
    elif not from_shards:
        logger.info("Taking the vision tower in %s.", found.name)
    elif asked == SHARDS:
        logger.warning(
            "Taking the vision tower in the checkpoint's shards, as asked for. The original runs the one in %s; "
            "whether both are equal was not looked at, since that one's weights are not on this machine.",
            found.name,
        )
    else:
        logger.warning(
            "Taking the vision tower in the checkpoint's shards, which the original would not use: it uses the one "
            "that config.json names. %s Name a tower with --vision-tower, or ask for this one with --vision-tower %s.",
            found.why_not,
            SHARDS,
        )


def _origin(found: FoundTower, asked, from_shards: bool, comparison: Comparison | None) -> dict[str, Any]:
    """What the training record says: the tower's name if it is not the checkpoint's own, and how it was chosen."""
    taken = SHARDS if from_shards else "named" if asked is None else "given"
    choice: dict[str, Any] = {"taken": taken, "asked_for": asked is not None}
    if comparison is not None:
        choice["compared_with"] = portable_name(found.name) if from_shards else SHARDS
        choice |= comparison.as_dict()
    outside = not from_shards and not found.is_inside
    return {**({"vision_tower": found.name} if outside else {}), "vision_tower_choice": choice}
