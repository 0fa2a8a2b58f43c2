"""One sample: from a record of LLaVA's form or the Hub's to `messages` and images, as TRL takes them."""

import re
from collections.abc import Mapping, Sequence
from typing import Any

from ..errors import ConvLlavaError
from ..utils.texts import shown, storable, text_error


IMAGE_TOKEN = "<image>"
OTHER_MEDIA = ("video", "videos", "audio", "audios")  # keys of samples that ask about more than images
# How LLaVA's files place a clip: before or after the question. Within a text, `<video>` is an element of HTML.
_CLIP = re.compile(r"^\s*<(video|audio)>(?!.*</\1>)|\n\s*<(video|audio)>\s*$", re.DOTALL)
ROLES = {"human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant", "system": "system"}


class DataError(ConvLlavaError):
    """Something is wrong with the data.

    `DataLoader` raises an error of a worker again with the worker's traceback as its text; the message is taken out
    of it.
    """

    def __init__(self, message: str):
        own = type(self)
        super().__init__(message.rpartition(f"{own.__module__}.{own.__qualname__}: ")[2].strip())


class SampleError(DataError):
    """A sample that cannot be trained on. `kind` groups such errors in reports."""

    def __init__(self, kind: str, message: str | None = None):
        super().__init__(kind if message is None else message)
        self.kind = "malformed" if message is None else kind

    def __reduce__(self):
        return type(self), (self.kind, str(self))


def sample_of(record: Mapping) -> dict[str, list]:
    """`messages` and `images` of a record: of LLaVA's form (`conversations`, `image`) or of the Hub's (`messages`,
    `images` or `image`).

    Returns:
        `messages`: `[{"role", "content": [{"type": "image", "text": None} | {"type": "text", "text": ...}]}]`,
        beginning with the user's turn or a system message. `images`: what the record has, in the order of the places:
        paths, or the `bytes` and `path` of undecoded rows of `datasets`.

    Raises:
        SampleError: something is missing, of another type or out of turn, an answer is empty, the numbers of places
            and of images differ, it asks about video or audio, or UTF-8 cannot hold a text.
    """
    if isinstance(record, UnreadableRecord):
        raise SampleError(record.kind, record.detail)
    if not isinstance(record, Mapping):
        raise SampleError("malformed", f"It is a {type(record).__name__}; expected an object with `conversations`.")
    if media := [key for key in OTHER_MEDIA if not _is_blank(record.get(key))]:
        raise SampleError("video sample", f"It has `{media[0]}`: {shown(record[media[0]])}. Only images can be seen.")
    images = images_of(record)
    in_hub_form = record.get("messages") is not None
    messages = as_parts(record["messages"], len(images)) if in_hub_form else messages_of(record)
    places = count_images(messages)
    if places != len(images):
        where = f"{places} place{'s' * (places != 1)} for an image ({IMAGE_TOKEN})"
        raise SampleError(
            "placeholder mismatch",
            f"The conversation has {where}, and the sample has {len(images)} image{'s' * (len(images) != 1)}.",
        )
    return {"messages": messages, "images": images}


class UnreadableRecord:
    """In place of a record whose extent in its file is known, but which cannot be read. `id` as the record has it."""

    def __init__(self, kind: str, detail: str, id: Any = None):
        self.kind = kind
        self.detail = detail
        self.id = id


def identity_of(record: Any) -> str | None:
    """What a record is called by its own file, short and on one line; `None` where it has no name."""
    identity = record.get("id") if isinstance(record, Mapping) else getattr(record, "id", None)
    if identity is None or identity == "":
        return None
    if not isinstance(identity, str):
        return shown(identity)
    identity = " ".join(storable(identity).split())
    return identity if len(identity) <= 120 else f"{identity[:120]}..."


def images_of(record: Mapping) -> list[Any]:
    """The images that a record names: `images` or `image` is one, a list of them, or absent.

    An image is a path, or a dict of `bytes` and `path` as `datasets` gives it undecoded.
    """
    column = "images" if record.get("images") is not None else "image"
    value = record.get(column)
    if value is None or value == "":
        return []
    images = [value] if isinstance(value, (str, Mapping)) else value
    if not isinstance(images, Sequence) or not all(map(_is_image, images)):
        raise SampleError(
            "malformed", f"`{column}` is {shown(value)}; expected a path, a list of paths, or nothing at all."
        )
    for image in images:
        path = image if isinstance(image, str) else image.get("path")
        if path is not None and (error := text_error(path)):
            raise SampleError("broken text", f"The path of an image, {shown(path)}, has {error}.")
    return list(images)


def messages_of(record: Mapping) -> list[dict]:
    """The messages of a LLaVA record, as the original code reads them.

    `conversations` is a list of `from` (`human`, `gpt`, `system`) and `value`. A leading `gpt` turn is left out. Of a
    human turn with one image, the image goes before the text, whose white space at both ends is cut; where several
    images are among the text, which the original cannot do, they stay there.
    """
    turns = record.get("conversations")
    if not isinstance(turns, Sequence) or isinstance(turns, str) or not turns:
        raise SampleError("malformed", "`conversations` is missing or empty; expected a list of `from` and `value`.")
    messages = []
    for number, turn in enumerate(turns):
        if not isinstance(turn, Mapping) or not isinstance(turn.get("value"), str):
            raise SampleError("malformed", f"Turn {number} is {shown(turn)}; expected `from` and a text as `value`.")
        role = _role(turn.get("from"), f"Turn {number} is from", "human, gpt or system")
        messages.append((role, _parts(turn["value"]) if role == "user" else [_text(turn["value"])]))
    return _in_turn(messages)


def as_parts(messages: Sequence[Mapping], images: int = 0) -> list[dict]:
    """Messages of the Hub's form with content as a list of parts.

    Content may be text. Then `<image>` in a user's text is the place of an image, as in LLaVA's form; where no
    message has a place, the images go before the first user's text, as TRL has it.
    """
    if not isinstance(messages, Sequence) or isinstance(messages, str) or not messages:
        raise SampleError("malformed", f"`messages` is {shown(messages)}; expected a list of `role` and `content`.")
    converted = []
    for number, message in enumerate(messages):
        if not isinstance(message, Mapping):
            raise SampleError("malformed", f"Message {number} is {shown(message)}; expected `role` and `content`.")
        role = _role(message.get("role"), f"Message {number} has the role", "user, assistant or system")
        converted.append((role, _content_parts(message.get("content"), role, number)))
    if all(isinstance(message.get("content"), str) for message in messages) and not any(
        part["type"] == "image" for _, content in converted for part in content
    ):
        first = next((content for role, content in converted if role == "user"), [])
        first[:0] = [dict(_IMAGE) for _ in range(images)]
    return _in_turn(converted)


def count_images(messages: list[dict]) -> int:
    """How many images messages of parts have a place for."""
    return sum(part["type"] == "image" for message in messages for part in message["content"])


_IMAGE = {"type": "image", "text": None}


def _text(text: str) -> dict:
    return {"type": "text", "text": text}


def _is_blank(value: Any) -> bool:
    if isinstance(value, Mapping):  # as tables write a file that is not there
        return all(field is None for field in value.values())
    return value is None or (isinstance(value, (str, Sequence)) and not value)


def _is_image(value: Any) -> bool:
    if not isinstance(value, Mapping):
        return isinstance(value, str) and bool(value)
    content, path = value.get("bytes"), value.get("path")
    if not isinstance(content, (bytes, type(None))) or not isinstance(path, (str, type(None))):
        return False
    return content is not None or bool(path)


def _role(name: Any, what: str, expected: str) -> str:
    role = ROLES.get(name) if isinstance(name, str) else None
    if role is None:
        raise SampleError("wrong role", f"{what} {shown(name)}; expected {expected}.")
    return role


def _parts(value: str) -> list[dict]:
    """A user's text in parts, its `<image>` as the places of images."""
    pieces = value.split(IMAGE_TOKEN)
    images = len(pieces) - 1
    if not images:
        return [_text(value)]
    if images == 1 or sum(bool(piece.strip()) for piece in pieces) <= 1:
        return [*(dict(_IMAGE) for _ in range(images)), _text(value.replace(IMAGE_TOKEN, "").strip())]
    parts = [part for piece in pieces for part in (_text(piece), dict(_IMAGE))][:-1]
    return [part for part in parts if part["type"] == "image" or part["text"]]


def _content_parts(content: Any, role: str, number: int) -> list[dict]:
    """The content of a message of the Hub's form in parts."""
    if isinstance(content, str):
        return _parts(content) if role == "user" else [_text(content)]
    if content is not None and (not isinstance(content, Sequence) or isinstance(content, bytes)):
        raise SampleError("malformed", f"Message {number} has the content {shown(content)}; expected text or parts.")
    parts = []
    for part in content or ():
        kind = part.get("type") if isinstance(part, Mapping) else None
        if kind == "image":
            parts.append(dict(_IMAGE))
        elif kind == "text" and isinstance(part.get("text"), (str, type(None))):
            parts.append(_text(part.get("text") or ""))
        else:
            raise SampleError("malformed", f"Message {number} has the part {shown(part)}; expected text or image.")
    return parts


def _in_turn(messages: list[tuple[str, list[dict]]]) -> list[dict]:
    """Messages that begin with the user's and take turns, checked."""
    opening = messages[:1] if messages[0][0] == "system" else []
    turns = messages[len(opening) :]
    left_out = int(bool(turns) and turns[0][0] == "assistant")
    for number, (role, content) in enumerate(turns[left_out:]):
        # As the file counts them, from 0.
        turn = f"turn {number + len(opening) + left_out}"
        expected = "user" if number % 2 == 0 else "assistant"
        if role != expected:
            raise SampleError("wrong role", f"It is {_WHOSE[role]} turn in {turn}; expected {_WHOSE[expected]}.")
        if role == "assistant" and not any((part["text"] or "").strip() for part in content):
            raise SampleError("empty answer", f"The answer in {turn} is empty.")
    kept = opening + turns[left_out:]
    if len(turns) - left_out < 2:
        raise SampleError("malformed", "There is no question with an answer.")
    for role, content in kept:
        if any(IMAGE_TOKEN in (part["text"] or "") for part in content):
            place = "a text part, where images are parts of their own" if role == "user" else f"{_WHOSE[role]} text"
            raise SampleError("placeholder mismatch", f"There is an {IMAGE_TOKEN} in {place}.")
        if role != "user" and any(part["type"] == "image" for part in content):
            raise SampleError("placeholder mismatch", f"There is an image in {_WHOSE[role]} message.")
        for part in content:
            if error := text_error(part["text"] or ""):
                raise SampleError("broken text", f"{_WHOSE[role].capitalize()} text has {error}.")
            if role == "user" and (clip := _CLIP.search(part["text"] or "")):
                raise SampleError(
                    "video sample",
                    f"The user's text has a place for a clip ({clip[0].strip()}). Only images can be seen.",
                )
    return [{"role": role, "content": content} for role, content in kept]


_WHOSE = {"user": "the user's", "assistant": "the assistant's", "system": "the system's"}
