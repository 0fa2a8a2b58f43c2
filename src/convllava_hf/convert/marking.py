"""Marks the assistant's turns in a language model's chat template, so that only they count in the loss.

Chat templates write messages in many ways: all roles in one expression, a branch for each role, by way of variables.
They have in common a loop over the messages. What the loop writes for one message is captured here, and where the
message is the assistant's, all of it after the generation prompt goes between `{% generation %}` and
`{% endgeneration %}`. Nothing else changes, and what comes out is compared with what the template wrote before.
"""

import json
import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from ..chat_templates import ANSWERS, QUESTIONS, assistant_mask_error, has_generation_markers, time_limit, turn
from ..errors import ConvLlavaError, first_line
from ..modeling.processing_convllava import IMAGE_TOKEN


_FIRST, _LAST = "\ue0f0", "\ue0f1"  # around the turns of the assistant, while we look for them; in no template
_REMEDY = (
    "Pass a template that marks the assistant's turns with {% generation %} and {% endgeneration %}, end-of-turn "
    "token included: --chat-template FILE (chat_template=... in Python). TRL's chat_templates has such files."
)
# Comments, raw text, expressions, and statements; within the last two, a string may hold what would end them.
_WITHIN = r"""(?:'(?:\\.|[^'\\])*'|"(?:\\.|[^"\\])*"|[^'"])*?"""
_SYNTAX = re.compile(
    r"\{#.*?#\}"
    r"|\{%[-+]?\s*raw\s*[-+]?%\}.*?\{%[-+]?\s*endraw\s*[-+]?%\}"
    rf"|\{{\{{{_WITHIN}\}}\}}"
    rf"|\{{%(?P<left>[-+]?)\s*(?P<name>\w+)(?P<rest>{_WITHIN})(?P<right>[-+]?)%\}}",
    re.DOTALL,
)
# Qwen3 writes an empty thought before a call of a tool, and drops it once the tool has answered. TRL finds what a
# tool's answer adds by comparing the two, so it must stay. Conversations without tools are written as before.
_DROPS_THOUGHTS = "{%- if loop.last or (not loop.last and reasoning_content) %}"
# Qwen2.5 writes the role in one statement, and the line break in the next with what is said. TRL's training variant
# takes the loss on that line break too, so we do.
_BARE_ROLE = re.compile(r"""['"]<\|im_start\|>['"] \+ message\.role \}\}""")


class TemplateFailure(Exception):
    """A template raised an error when it was rendered, or is not valid."""


@dataclass(frozen=True)
class _Loop:
    """A `for` in a template: its variable, and where its body and what follows the loop begin and end.

    `opening` and `closing` are the signs by which the tags around the body control blanks: "-", "+" or nothing.
    """

    variable: str
    start: int
    end: int
    after: int
    opening: str
    closing: str
    following: str
    outermost: bool


@dataclass(frozen=True)
class _Turn:
    """A turn of the assistant as a template wrote it.

    `header`: what comes before the answer. `prompt`: what the model would have been given to generate the answer,
    `None` if there is nothing.
    """

    header: str
    prompt: str | None


def mark_assistant(tokenizer: Any, template: str) -> str:
    """The chat template with the assistant's turns marked, header excluded and end-of-turn token included.

    Args:
        tokenizer: of the language model; it knows all special tokens.
        template: takes messages whose content is written in parts. One that has markers already is kept.

    Raises:
        ConvLlavaError: it cannot be marked; the message says what to do.
    """
    with time_limit():
        marked = template if has_generation_markers(template) else _marked(tokenizer, template)
    if marked is None:
        raise ConvLlavaError(
            "The language model's chat template cannot be marked for training: no loop in it writes an assistant's "
            f"message as a turn that ends with a special token. {_REMEDY}"
        )
    if (fault := assistant_mask_error(tokenizer, marked)) is not None:
        raise ConvLlavaError(f"The language model's chat template cannot be trained with: {fault}. {_REMEDY}")
    return marked


def render(tokenizer: Any, template: str, messages: list[dict], prompt: bool = False) -> str:
    """What the template makes of the messages.

    Raises:
        TemplateFailure: it raises an error.
    """
    try:
        return tokenizer.apply_chat_template(
            messages, chat_template=template, tokenize=False, add_generation_prompt=prompt
        )
    except ConvLlavaError:
        raise  # the time is up
    except Exception as error:  # a template is a program: it may raise anything
        raise TemplateFailure(first_line(error)) from error


def _marked(tokenizer: Any, template: str) -> str | None:
    try:
        render(tokenizer, template, _conversation(1))
    except TemplateFailure as error:
        raise ConvLlavaError(
            f"The language model's chat template cannot write a question and an answer: {error}. {_REMEDY}"
        ) from error
    kept = template.replace(_DROPS_THOUGHTS, "{%- if true %}")
    if _same(tokenizer, template, kept, _PLAIN):
        template = kept
    for loop in _loops(template):
        turns = _turns(tokenizer, template, loop)
        if turns is None:
            continue
        header, name = _header(turns, template), _name(template, "turn")
        marked = _with_tail(tokenizer, template, loop)
        marked = _with_turns(marked, loop, _emission(template, loop, header, name), name)
        if _same(tokenizer, template, marked, [*_PLAIN, *_OTHERS]):
            return marked
    return None


# --- finding loops --------------------------------------------------------------------------------------------------


def _loops(template: str) -> list[_Loop]:
    """The loops of a template over one variable, in their order."""
    opened, found = [], []
    for match in _SYNTAX.finditer(template):
        name = match["name"]
        if name in ("for", "if"):
            opened.append([match, None])
        elif name == "else" and opened and opened[-1][1] is None:
            opened[-1][1] = match
        elif name in ("endfor", "endif") and opened:
            first, otherwise = opened.pop()
            variable = re.match(r"\s+(\w+)\s+in\s", first["rest"]) if first["name"] == "for" else None
            if variable and name == "endfor":
                last = otherwise or match
                found.append(
                    _Loop(
                        variable=variable[1], start=first.end(), end=last.start(), after=match.end(),
                        opening=first["right"], closing=last["left"], following=match["right"], outermost=not opened,
                    )
                )  # fmt: skip
    return sorted(found, key=lambda loop: loop.start)


# --- changing templates ---------------------------------------------------------------------------------------------


def _name(template: str, name: str) -> str:
    """`name`, or one like it that the template does not use."""
    while re.search(rf"\b{name}\b", template):
        name += "_"
    return name


def _with_turns(template: str, loop: _Loop, emission: str, name: str) -> str:
    """The template with what the loop writes for one message captured as `name`, and `emission` in its place."""
    body = template[loop.start : loop.end]
    captured = f"{{% set {name} {loop.opening}%}}{body}{{%{loop.closing} endset -%}}\n"
    return template[: loop.start] + captured + emission + template[loop.end :]


def _emission(template: str, loop: _Loop, header: str, name: str) -> str:
    """Writes a captured message, with what the assistant says after the header marked."""
    is_assistant = f'{loop.variable}["role"] == "assistant"'
    marked = "{%- generation -%}{{- WHAT -}}{%- endgeneration -%}\n"
    comment = "{#- Training takes its loss on what is marked: what the assistant says, and the end of its turn. -#}\n"
    otherwise = f"{{%- else -%}}\n    {{{{- {name} -}}}}\n{{%- endif -%}}\n"
    if not header:
        return f"{comment}{{%- if {is_assistant} -%}}\n    {marked.replace('WHAT', name)}{otherwise}"
    start = _name(template, "header")
    return (
        f"{comment}{{%- set {start} = {json.dumps(header, ensure_ascii=False)} -%}}\n"
        f"{{%- if {is_assistant} and {start} in {name} -%}}\n"
        f"    {{{{- {name}.split({start}, 1)[0] + {start} -}}}}\n"
        f"    {marked.replace('WHAT', f'{name}.split({start}, 1)[1]')}{otherwise}"
    )


def _with_tail(tokenizer: Any, template: str, loop: _Loop) -> str:
    """The template with a special token that it writes after the last message marked as well, if the assistant said
    the last (Phi 3)."""
    tail = render(tokenizer, _instrumented(template, loop), _conversation(1)).rpartition(_LAST)[2]
    if not loop.outermost or not _stops(tokenizer).fullmatch(tail):
        return template
    source = template[loop.after :].removesuffix("\n")
    name = _name(template, "tail")
    emission = (
        '{%- if messages and messages[-1]["role"] == "assistant" and not add_generation_prompt -%}\n'
        f"    {{%- generation -%}}{{{{- {name} -}}}}{{%- endgeneration -%}}\n"
        f"{{%- else -%}}\n    {{{{- {name} -}}}}\n{{%- endif -%}}\n"
    )
    captured = f"{{%- set {name} {loop.following}%}}{source}{{%+ endset -%}}\n"
    return template[: loop.after] + captured + emission


def _instrumented(template: str, loop: _Loop) -> str:
    """The template with `_FIRST` and `_LAST` written around every turn of the assistant."""
    name = _name(template, "turn")
    said = f'{{{{- "{_FIRST}" + {name} + "{_LAST}" if {loop.variable}["role"] == "assistant" else {name} -}}}}'
    return _with_turns(template, loop, said, name)


# --- looking at what templates write --------------------------------------------------------------------------------


def _turns(tokenizer: Any, template: str, loop: _Loop) -> list[_Turn] | None:
    """The assistant's turns in some conversations as the loop writes them; `None` if it does not write them whole."""
    instrumented = _instrumented(template, loop)
    found = []
    for messages in (_conversation(1), _conversation(2)):
        answers = [text for text in ANSWERS if turn("assistant", text) in messages]
        try:
            text = render(tokenizer, template, messages)
            looked_at = render(tokenizer, instrumented, messages)
        except TemplateFailure:
            return None
        pieces = re.findall(f"{_FIRST}(.*?){_LAST}", looked_at, re.DOTALL)
        if re.sub(f"[{_FIRST}{_LAST}]", "", looked_at) != text or len(pieces) != len(answers):
            return None
        tail = looked_at.rpartition(_LAST)[2]
        for number, (piece, answer) in enumerate(zip(pieces, answers, strict=True)):
            header, there, rest = piece.partition(answer)
            ends = (rest, rest + tail) if number == len(answers) - 1 else (rest,)
            if not there or not any(map(_stops(tokenizer).fullmatch, ends)):
                return None
            before = text[: text.index(answer) - len(header)]
            found.append(_Turn(header, _prompt(tokenizer, template, messages[: 2 * number + 1], before)))
    return found


def _prompt(tokenizer: Any, template: str, messages: list[dict], before: str) -> str | None:
    """What is written after `before` to let the model generate."""
    asked = render(tokenizer, template, messages, prompt=True)
    if asked == render(tokenizer, template, messages) or not asked.startswith(before):
        return None
    return asked[len(before) :]


def _header(turns: list[_Turn], template: str) -> str:
    """What a turn of the assistant begins with before the model generates."""
    prompts = [one.prompt for one in turns if one.prompt is not None]
    header = os.path.commonprefix([one.header for one in turns])
    given = os.path.commonprefix([header, *prompts])
    if given in prompts or (not prompts and not header.strip()):
        header = given if prompts else ""  # what the model writes itself is learned, be it a blank
    return header.removesuffix("\n") if _BARE_ROLE.search(template) else header


def _stops(tokenizer: Any) -> re.Pattern:
    """One or more special tokens, with blanks around them."""
    tokens = {*tokenizer.all_special_tokens, *tokenizer.get_added_vocab()} - {IMAGE_TOKEN, ""}
    return re.compile(rf"\s*(?:(?:{'|'.join(map(re.escape, sorted(tokens, key=len, reverse=True)))})\s*)+")


def _same(tokenizer: Any, template: str, other: str, conversations: list[list[dict]]) -> bool:
    """Whether two templates write the conversations alike, or refuse them alike."""

    def written(one: str) -> Iterator[str | None]:
        for messages in conversations:
            for prompt in (False, True):
                try:
                    yield render(tokenizer, one, messages, prompt)
                except TemplateFailure:
                    yield None

    return list(written(template)) == list(written(other))


def _conversation(turns: int) -> list[dict]:
    pairs = zip(QUESTIONS[:turns], ANSWERS[:turns], strict=True)
    return [message for asked, said in pairs for message in (turn("user", asked), turn("assistant", said))]


_SYSTEM = turn("system", "be short")
_CALL = {"type": "function", "function": {"name": "look", "arguments": {"at": "lamp"}}}
_THOUGHT = f"<think>\nhm\n</think>\n\n{ANSWERS[0]}"
_PLAIN = [
    messages
    for system in ([], [_SYSTEM])
    for messages in (
        [*system, *_conversation(1)],
        [*system, *_conversation(2)],
        [*system, *_conversation(2)[:1]],
        [*system, *_conversation(2)[:3]],
        [*system, turn("user", f" {QUESTIONS[0]}\n"), turn("assistant", f"\n {ANSWERS[0]} \n")],
        [*system, turn("user", QUESTIONS[0]), turn("assistant", _THOUGHT), turn("user", QUESTIONS[1])],
        [*system, turn("user", QUESTIONS[0]), turn("assistant", _THOUGHT)],
    )
]
_OTHERS = [
    [_SYSTEM],
    [*_conversation(1), turn("assistant", ANSWERS[1])],
    [turn("assistant", ANSWERS[0]), *_conversation(1)],
    [turn("user", QUESTIONS[0]), turn("assistant", "", tool_calls=[_CALL])],
    [turn("user", QUESTIONS[0]), turn("assistant", "", tool_calls=[_CALL]), turn("tool", "a lamp", name="look")],
]
