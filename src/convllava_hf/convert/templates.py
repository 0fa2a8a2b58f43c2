"""Chat templates: Vicuna's, and a language model's own with images in it."""

from importlib import resources
from pathlib import Path

from ..chat_templates import time_limit
from ..errors import ConvLlavaError, first_line
from .marking import TemplateFailure, mark_assistant, render
from .tokenizers import IMAGE_TOKEN, prefix_after


_FIRST_LINES = '{%- set after_bos = " " -%}\n{%- set after_image = after_bos -%}\n'

# Stands before a template that knows nothing of images and hands it every message's content as a string, with a line
# of its own for each image. It ends without stripping, so the template behind it begins exactly as before.
_IMAGES = """\
{%- set with_images = namespace(messages=[]) -%}
{%- for message in messages -%}
    {%- if message["content"] is defined and message["content"] is iterable and message["content"] is not string -%}
        {%- set written = namespace(text="") -%}
        {%- for part in message["content"] -%}
            {%- if part["type"] == "text" -%}
                {%- set written.text = written.text + part["text"] -%}
            {%- elif part["type"] == "image" -%}
                {%- set written.text = written.text + "<image>\\n" -%}
            {%- else -%}
                {{- raise_exception("A message's part is of type '" + part["type"] + "'; expected text or image.") -}}
            {%- endif -%}
        {%- endfor -%}
        {%- set with_images.messages = with_images.messages + [dict(message, content=written.text)] -%}
    {%- else -%}
        {%- set with_images.messages = with_images.messages + [message] -%}
    {%- endif -%}
{%- endfor -%}
{%- set messages = with_images.messages %}
"""


def vicuna_template(after_bos: str = " ", after_image: str | None = None) -> str:
    """The Vicuna-v1 template of ConvLLaVA.

    Args:
        after_bos: what goes between the token for the beginning of a sequence and the text: a blank where the
            tokenizer puts SentencePiece's dummy prefix only before the beginning of the text, nothing otherwise.
        after_image: what goes between an image and text after it, likewise. Default: the same.
    """
    template = (resources.files("convllava_hf.modeling") / "chat_template.jinja").read_text(encoding="utf-8")
    after_image = after_bos if after_image is None else after_image
    if not template.startswith(_FIRST_LINES) or not {after_bos, after_image} <= {"", " "}:
        raise ValueError(
            f"chat_template.jinja must begin with {_FIRST_LINES!r}, and after_bos and after_image be '' or ' ', not "
            f"{after_bos!r} and {after_image!r}."
        )
    first = f'{{%- set after_bos = "{after_bos}" -%}}\n{{%- set after_image = "{after_image}" -%}}\n'
    return first + template.removeprefix(_FIRST_LINES)


def template_with_images(tokenizer, after_bos: str, template: str | None = None) -> str:
    """The chat template of a language model's tokenizer, able to take images, with the assistant's turns marked for
    training; Vicuna's where the tokenizer has none.

    Args:
        tokenizer: has `<image>` already.
        after_bos: for Vicuna's template, see `vicuna_template`.
        template: in place of the tokenizer's.

    Raises:
        ConvLlavaError: the template cannot be used for training.
    """
    template = template or tokenizer.chat_template
    if isinstance(template, dict):
        template = template.get("default")
    if not template:
        template = vicuna_template(after_bos)
        template = template if tokenizer.bos_token else '{%- set bos_token = "" -%}\n' + template
    elif not _takes_images(tokenizer, template):
        template = _images(tokenizer) + template
    return mark_assistant(tokenizer, template)


def _images(tokenizer) -> str:
    """`_IMAGES`, with what gives the text after an image its dummy prefix."""
    return _IMAGES.replace(IMAGE_TOKEN, IMAGE_TOKEN + prefix_after(tokenizer, IMAGE_TOKEN))


def read_template(path: str | Path) -> str:
    """A chat template's file.

    Raises:
        ConvLlavaError: it cannot be read.
    """
    try:
        return Path(path).expanduser().read_text(encoding="utf-8")
    except (OSError, ValueError) as error:  # the latter: no UTF-8, or a path that cannot be one
        raise ConvLlavaError(f"The chat template {str(path)!r} cannot be read: {first_line(error)}.") from error


def _takes_images(tokenizer, template: str) -> bool:
    content = [{"type": "image"}, {"type": "text", "text": "probe"}]
    try:
        with time_limit():
            text = render(tokenizer, template, [{"role": "user", "content": content}])
    except TemplateFailure:
        return False  # it takes strings only
    return text.count(IMAGE_TOKEN) == 1 and "probe" in text and "'type'" not in text
