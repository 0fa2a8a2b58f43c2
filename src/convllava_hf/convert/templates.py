"""Chat templates: Vicuna's, and a language model's own with pictures in it."""

from importlib import resources

from ..chat_templates import time_limit
from .marking import TemplateFailure, mark_assistant, render
from .tokenizers import IMAGE_TOKEN


_FIRST_LINE = '{%- set after_bos = " " -%}'

# Stands before a template that knows nothing of pictures and hands it every message's content as a string, with a line
# of its own for each picture. It ends without stripping, so the template behind it begins exactly as before.
_PICTURES = """\
{%- set with_pictures = namespace(messages=[]) -%}
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
        {%- set with_pictures.messages = with_pictures.messages + [dict(message, content=written.text)] -%}
    {%- else -%}
        {%- set with_pictures.messages = with_pictures.messages + [message] -%}
    {%- endif -%}
{%- endfor -%}
{%- set messages = with_pictures.messages %}
"""


def vicuna_template(after_bos: str = " ") -> str:
    """The Vicuna-v1 template of ConvLLaVA.

    Args:
        after_bos: what stands between the beginning-of-sequence token and the text: a blank where the tokenizer puts
            SentencePiece's dummy prefix before the beginning of the text alone, nothing otherwise.
    """
    template = (resources.files("convllava_hf.modeling") / "chat_template.jinja").read_text(encoding="utf-8")
    first, rest = template.split("\n", 1)
    if first != _FIRST_LINE or after_bos not in ("", " "):
        raise ValueError(f"chat_template.jinja must begin with {_FIRST_LINE!r}, and after_bos be '' or ' '.")
    return f'{{%- set after_bos = "{after_bos}" -%}}\n{rest}'


def template_with_pictures(tokenizer, after_bos: str, template: str | None = None) -> str:
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
    elif not _takes_pictures(tokenizer, template):
        template = _PICTURES + template
    return mark_assistant(tokenizer, template)


def _takes_pictures(tokenizer, template: str) -> bool:
    content = [{"type": "image"}, {"type": "text", "text": "probe"}]
    try:
        with time_limit():
            text = render(tokenizer, template, [{"role": "user", "content": content}])
    except TemplateFailure:
        return False  # it takes strings only
    return text.count(IMAGE_TOKEN) == 1 and "probe" in text and "'type'" not in text
