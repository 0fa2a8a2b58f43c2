"""Which option, or yes or no, a free answer means, by rules; `None` where they do not decide."""

import re
import string
from collections.abc import Sequence

from ...errors import ConvLlavaError


# "B", "(b)", "B.", "[B]:" and nothing else.
_BARE_LETTER = re.compile(r"[\[(\"'*]*([A-Za-z])[\])\"'*.:,]*")
# "B. a dog", "(b) a dog", "B: a dog", "b) a dog", "**B**", "B - a dog".
_LETTER_FIRST = re.compile(r"\*{0,2}(?:[(\[]([A-Za-z])[)\]]|([A-Za-z])\)|([A-Z])(?:\*\*|[.:\]]|,?\s+-))(?=\s|$)")
# "The answer is (B)", "Answer: B", "option B", "I choose B".
_LETTER_NAMED = re.compile(
    r"\b(?:answer|option|choice|choose|select|pick)(?:\s+(?:is|would be|should be|option))*\s*:?\s*"
    r"\*{0,2}[(\[\"']?([A-Z])(?![\w'])",
    re.IGNORECASE,
)
_LETTER_ANYWHERE = re.compile(r"(?<![\w'.])([A-Z])(?![\w'])")
# "A dog", "I think"; but "A because ...", "A is right", "A and B": these words follow no article.
_ARTICLE = re.compile(r"[AI]\s+(?!(?:and|as|because|for|in|is|or|since)\b)[a-z]")
_YES_NO = {"yes": True, "no": False}
_SHORT = {"y": True, "n": False}


def parse_choice(prediction: str, choices: Sequence[str]) -> int | None:
    """The index of the option that an answer to a multiple-choice question means; `None` if it names none or several.

    In this order: only a letter (`B`, `(b)`); an option's text and nothing else; a letter with its mark before the
    rest (`B. a dog`); the letter that is called the answer (`The answer is B`), one if there are several; the only
    capital letter that is a word, but not the article; the only option whose text occurs, as whole words, one
    within another not counted. This is what MMBench (arXiv 2307.06281) calls heuristic matching.

    Args:
        choices: the options' texts, without letters, in the order of the letters A, B, C, ...

    Raises:
        ConvLlavaError: no options, or more than there are letters.
    """
    if isinstance(choices, str) or not 1 <= len(choices) <= len(string.ascii_uppercase):
        raise ConvLlavaError(f"choices is {choices!r}, and a list of 1 to 26 texts is expected.")
    text = prediction.strip()
    if (match := _BARE_LETTER.fullmatch(text)) and (index := _index(match[1], len(choices))) is not None:
        return index
    folded = [_fold(choice) for choice in choices]
    if folded.count(_fold(text)) == 1:
        return folded.index(_fold(text))
    if match := _LETTER_FIRST.match(text):
        (letter,) = filter(None, match.groups())
        if (index := _index(letter, len(choices))) is not None:
            return index
    mentions = _mentions(text, choices)
    rest = _without(text, [span for index, spans in mentions.items() if len(choices[index]) > 1 for span in spans])
    for pattern in (_LETTER_NAMED, _LETTER_ANYWHERE):
        letters = {m[1] for m in pattern.finditer(rest) if m[1].isupper() and not _ARTICLE.match(text, m.start(1))}
        if indices := {_index(letter, len(choices)) for letter in letters} - {None}:
            return indices.pop() if len(indices) == 1 else None
    return next(iter(mentions)) if len(mentions) == 1 else None


def parse_yes_no(prediction: str) -> bool | None:
    """Whether an answer says yes or no; `None` if it says neither, or both with neither of them first.

    Whole words count, so `Not sure` and `Yesterday` are neither. `y` and `n` count if they are all there is. POPE
    (arXiv 2305.10355) and MME (arXiv 2306.13394) ask for yes or no and leave the reading of other answers open.
    """
    words = re.findall(r"\w+", prediction.lower())
    if len(words) == 1 and words[0] in _SHORT:
        return _SHORT[words[0]]
    said = [_YES_NO[word] for word in words if word in _YES_NO]
    if not said or (len(set(said)) == 2 and words[0] not in _YES_NO):
        return None
    return said[0]


def _index(letter: str, options: int) -> int | None:
    index = string.ascii_uppercase.index(letter.upper())
    return index if index < options else None


def _fold(text: str) -> str:
    return " ".join(text.lower().split()).rstrip(".")


def _mentions(text: str, choices: Sequence[str]) -> dict[int, list[tuple[int, int]]]:
    """Where options occur in a text as whole words, by index; not where one does so within a longer one."""
    found: dict[int, list[tuple[int, int]]] = {}
    for index, choice in enumerate(choices):
        words = r"\s+".join(map(re.escape, choice.strip().rstrip(".").split()))
        if words:
            found[index] = [m.span() for m in re.finditer(rf"(?<!\w){words}(?!\w)", text, re.IGNORECASE)]
    every = [span for spans in found.values() for span in spans]
    for index, spans in found.items():
        found[index] = [span for span in spans if not _within_another(span, every)]
    return {index: spans for index, spans in found.items() if spans}


def _within_another(span: tuple[int, int], spans: Sequence[tuple[int, int]]) -> bool:
    return any(other != span and other[0] <= span[0] and span[1] <= other[1] for other in spans)


def _without(text: str, spans: Sequence[tuple[int, int]]) -> str:
    """The text inked over at some places, so that "vitamin C" is not taken for the letter C."""
    for start, end in spans:
        text = text[:start] + "_" * (end - start) + text[end:]
    return text
