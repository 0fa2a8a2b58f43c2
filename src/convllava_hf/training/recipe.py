"""Reads recipes: YAML with known keys and values of their types; errors are one line that says what is wrong."""

import difflib
import os
import sys
import types
from collections.abc import Iterable, Sequence
from enum import Enum
from pathlib import Path
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

import yaml
from trl import TrlParser

from ..errors import ConvLlavaError, first_line


MAX_BYTES = 2**20
MAX_NODES = 10_000
RESOLUTION = "{resolution}"
# What TRL's and transformers' dataclasses raise on values that they cannot use.
_REFUSALS = (
    *(ValueError, TypeError, KeyError, AttributeError, ImportError, OSError),
    *(RuntimeError, AssertionError, OverflowError),
)
_ALSO = {"resume_from_checkpoint": bool, "fsdp": bool | list}  # more than the annotation says
_WORDS = {bool: "true or false", int: "a whole number", float: "a number", str: "text", dict: "a mapping"}


class RecipeParser(TrlParser):
    """TRL's parser of a recipe and of options that override it. Raises `ConvLlavaError` for what it cannot use."""

    def error(self, message: str):
        raise ConvLlavaError(f"The options cannot be used: {message}")

    def parse_args_and_config(self, args: Iterable[str] | None = None) -> tuple:
        """The dataclasses, filled from the recipe that `--config` names and from the options over it.

        Raises:
            ConvLlavaError: the recipe cannot be read, or names or values in it or in the options cannot be used.
        """
        path, options = split_option("--config", list(sys.argv[1:] if args is None else args))
        if path is not None:
            self._take(read_recipe(path))
        try:
            *parsed, unknown = self.parse_args_into_dataclasses(args=options, return_remaining_strings=True)
        except ConvLlavaError:
            raise
        except _REFUSALS as error:
            raise ConvLlavaError(f"The recipe cannot be used: {first_line(error)}") from error
        if unknown:
            raise ConvLlavaError(self.unknown_key(unknown[0].lstrip("-").partition("=")[0], "The options have"))
        return tuple(parsed)

    def parse_known_args(self, args=None, namespace=None):
        """As argparse does; then `{resolution}` in texts becomes the value of `resolution`."""
        namespace, rest = super().parse_known_args(args, namespace)
        resolution = getattr(namespace, "resolution", None)
        for key, value in vars(namespace).items():
            setattr(namespace, key, _with_resolution(key, value, resolution))
        return namespace, rest

    def _take(self, recipe: dict[str, Any]) -> None:
        """Makes a recipe's values the defaults of the options."""
        environment = recipe.pop("env", {})
        if not isinstance(environment, dict) or not all(map(_is_plain, environment.values())):
            raise ConvLlavaError("`env` in the recipe is not a mapping of environment variables to their values.")
        kinds = {key: kind for one in self.dataclass_types for key, kind in get_type_hints(one).items()}
        choices = {action.dest: action.choices for action in self._actions}
        for key in recipe:
            if key not in choices or key not in kinds:
                raise ConvLlavaError(self.unknown_key(key, "The recipe has"))
            if recipe[key] is False and "no" in (choices[key] or ()):
                recipe[key] = "no"  # which YAML reads as false
            _check_value(key, recipe[key], kinds[key], choices[key])
        os.environ.update({str(name): str(value) for name, value in environment.items()})
        self.set_defaults_with_config(**recipe)

    def unknown_options(self, arguments: list[str]) -> list[str]:
        """The options that are not of a recipe, and their values."""
        _, options = split_option("--config", arguments)
        return super().parse_known_args(options)[1]

    def unknown_key(self, key: Any, where: str, also: Iterable[str] = ()) -> str:
        """A message that there is no such key, neither a recipe's nor one of `also`."""
        known = sorted({*(action.dest for action in self._actions), *also})
        close = difflib.get_close_matches(str(key), known, n=3)
        hint = f" Did you mean {' or '.join(close)}?" if close else " convllava train --help lists them all."
        return f"{where} the key {_shown(key)}, which does not exist.{hint}"


def read_recipe(path: str | os.PathLike) -> dict[str, Any]:
    """The keys and values of a recipe.

    Raises:
        ConvLlavaError: there is no such file, or it is too large, not text, not YAML, or not a mapping.
    """
    name = os.fspath(path)
    try:
        if not Path(name).exists():
            raise ConvLlavaError(f"There is no recipe at {name!r}: check --config.")
        if not Path(name).is_file():
            raise ConvLlavaError(f"--config takes a recipe file, and {name!r} is none.")
        if (size := Path(name).stat().st_size) > MAX_BYTES:
            raise ConvLlavaError(f"{name!r} has {size:,} bytes, too many for a recipe: check --config.")
        text = Path(name).read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ConvLlavaError(f"The recipe {name!r} cannot be used: it is not UTF-8 text. Check --config.") from error
    except OSError as error:
        raise ConvLlavaError(f"The recipe {name[:200]!r} cannot be read: {error.strerror}.") from error
    try:
        recipe = _load(text)
    except yaml.YAMLError as error:
        where = f" in line {error.problem_mark.line + 1}" if getattr(error, "problem_mark", None) else ""
        why = getattr(error, "problem", None) or first_line(error)
        raise ConvLlavaError(f"The recipe {name!r} cannot be used: it is not valid YAML{where} ({why}).") from error
    except (ValueError, RecursionError) as error:
        raise ConvLlavaError(f"The recipe {name!r} cannot be used: {first_line(error)}.") from error
    if not isinstance(recipe, dict):
        raise ConvLlavaError(f"The recipe {name!r} is not a mapping of keys to values.")
    return recipe


def _load(text: str) -> Any:
    """YAML whose aliases, written out, do not grow beyond what a recipe may hold."""
    loader = yaml.SafeLoader(text)
    try:
        node = loader.get_single_node()
        if node is None:
            return {}
        if _nodes(node, {}) > MAX_NODES:
            raise ValueError(f"with its aliases written out it has more than {MAX_NODES:,} values")
        return loader.construct_document(node)
    finally:
        loader.dispose()


def _nodes(node: yaml.Node, known: dict[int, int | None]) -> int:
    """How many nodes there are with aliases written out. `known`: of nodes seen; `None` while one is counted."""
    if id(node) not in known:
        known[id(node)] = None
        children = node.value if isinstance(node, yaml.CollectionNode) else []
        flat = (child for entry in children for child in (entry if isinstance(entry, tuple) else (entry,)))
        known[id(node)] = 1 + sum(_nodes(child, known) for child in flat)
    count = known[id(node)]
    if count is None:
        raise ValueError("an alias in it is a part of itself")
    return count


def split_option(name: str, arguments: list[str]) -> tuple[str | None, list[str]]:
    """The value of an option, `None` if it is not given, and the other arguments.

    Raises:
        ConvLlavaError: it has no value.
    """
    for index, argument in enumerate(arguments):
        if argument == name:
            if index + 1 == len(arguments):
                raise ConvLlavaError(f"{name} needs a value, such as the path of a file.")
            return arguments[index + 1], arguments[:index] + arguments[index + 2 :]
        if argument.startswith(f"{name}="):
            return argument.partition("=")[2], arguments[:index] + arguments[index + 1 :]
    return None, arguments


def _with_resolution(key: str, value: Any, resolution: int | None) -> Any:
    if isinstance(value, dict):
        return {name: _with_resolution(key, one, resolution) for name, one in value.items()}
    if isinstance(value, list):
        return [_with_resolution(key, one, resolution) for one in value]
    if not isinstance(value, str) or RESOLUTION not in value:
        return value
    if resolution is None:
        raise ConvLlavaError(
            f"{key} is {_shown(value)}, but resolution is not set: give --resolution 768, for example."
        )
    return value.replace(RESOLUTION, str(resolution))


def _check_value(key: str, value: Any, kind: Any, choices: Sequence | None) -> None:
    if not (_fits(value, kind) or (key in _ALSO and _fits(value, _ALSO[key]))):
        raise ConvLlavaError(f"{key} in the recipe is {_shown(value)}; expected {_describe(kind)}.")
    for one in value if isinstance(value, list) else [value]:
        if choices and one is not None and one not in choices:
            close = difflib.get_close_matches(str(one), map(str, choices), n=1)
            raise ConvLlavaError(
                f"{key} in the recipe is {_shown(one)}; expected one of {', '.join(map(str, choices))}."
                + (f" Did you mean {close[0]}?" if close else "")
            )


def _fits(value: Any, kind: Any) -> bool:
    """Whether a value from YAML is of the type that a dataclass gives its field. Numbers may be written as text."""
    origin = get_origin(kind)
    if origin in (Union, types.UnionType):
        return any(_fits(value, one) for one in get_args(kind))
    if origin is Literal:
        return value in get_args(kind)
    if origin is list or kind is list:
        inner = get_args(kind)[0] if get_args(kind) else Any
        return all(_fits(one, inner) for one in (value if isinstance(value, list) else [value]))
    if origin is dict or kind is dict:
        return isinstance(value, dict)
    if kind in (None, types.NoneType):
        return value is None
    if kind is bool:
        return isinstance(value, bool) or str(value).lower() in ("true", "false", "yes", "no", "t", "f", "y", "n")
    if kind in (int, float):
        return not isinstance(value, bool) and (_reads_as(kind, value) if isinstance(value, str) else _is(kind, value))
    if isinstance(kind, type) and issubclass(kind, Enum):
        return value in [one.value for one in kind]
    return kind is Any or (isinstance(kind, type) and isinstance(value, kind))


def _is(kind: type, value: Any) -> bool:
    return isinstance(value, int) or (kind is float and isinstance(value, float))


def _reads_as(kind: type, text: str) -> bool:
    try:
        kind(text)
    except ValueError:
        return False
    return True


def _is_plain(value: Any) -> bool:
    return isinstance(value, (str, int, float, bool))


def _describe(kind: Any) -> str:
    if get_origin(kind) in (Union, types.UnionType):
        parts = [_describe(one) for one in get_args(kind)]
        return " or ".join(dict.fromkeys(parts))
    if get_origin(kind) is Literal:
        return " or ".join(map(str, get_args(kind)))
    if get_origin(kind) is list or kind is list:
        return "a list of " + (f"values, each {_describe(get_args(kind)[0])}" if get_args(kind) else "values")
    if kind in (None, types.NoneType):
        return "null"
    if isinstance(kind, type) and issubclass(kind, Enum):
        return "one of " + ", ".join(str(one.value) for one in kind)
    return _WORDS.get(get_origin(kind) or kind, "what cannot be written in a recipe")


def _shown(value: Any) -> str:
    """A value for a message: its first characters, never a copy of something large."""
    if isinstance(value, (dict, list)):
        return f"a {'mapping' if isinstance(value, dict) else 'list'} of {len(value)}"
    text = repr(value)
    return text if len(text) <= 80 else text[:80] + "..."
