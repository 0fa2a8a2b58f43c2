"""The benchmarks: for each, its data set on the Hub, what the model is asked, and which answers are right.

To add a benchmark, write the function that reads a row and add an entry to `_ALL`: nothing else names it.

Prompts are those of LLaVA-1.5's evaluation (arXiv 2310.03744, appendix), in whose format ConvLLaVA was trained.
Columns are those of the data sets as lmms-lab (OCRBench: echo840) has them on the Hub.
"""

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from ..errors import ConvLlavaError
from .metrics import anls, exact_match, relaxed_accuracy, textvqa_accuracy, vqa_accuracy
from .samples import (
    LETTERS,
    MissingValueError,
    Question,
    Sample,
    letter_at,
    letter_of,
    optional_text,
    options_text,
    text_of,
    texts_of,
)
from .scorers import (
    F1,
    Mean,
    Mme,
    Scorer,
    Summary,
    by_answers,
    by_choice,
    by_containment,
    by_overlap,
    by_yes_no,
)


CHOICES = ("letter", "likelihood")
SHORT = "{question}\nAnswer the question using a single word or phrase."
LETTER = "{question}\n{options}\nAnswer with the option's letter from the given choices directly."
BOX = "Please provide the bounding box coordinate of the region this sentence describes: {question}."
_WITH_WORDS = "{question}\nReference OCR token: {words}\nAnswer the question using a single word or phrase."
# Copies of a question with its options in another order have its number and a multiple of this (MMBench's files).
_ROTATION = 1_000_000
_OPTION_LINE = re.compile(r"^([A-Z])\.\s+(.+)$", re.MULTILINE)
_LETTERS_ONLY = "Please answer directly with only the letter of the correct option and nothing else."


@dataclass(frozen=True)
class Images:
    """Images in a table of their own: `config` and `split` of the same data set, and the column that is the key."""

    config: str
    split: str
    key: str = "id"


@dataclass(frozen=True)
class Benchmark:
    """What a benchmark asks and how it is scored.

    `name`: as the command line takes it. `title`: as the paper's table has it. `dataset`, `config`, `split`: on the
    Hub. `read`: what a row asks; `None` for rows that do not belong to it. `columns`: that the rows must have, besides
    `image`. `prompt`: what is said, with the places of `question`, `options` and `words`. `metric`: its name.
    `has_choices`: whether options' likelihoods can decide.
    """

    name: str
    title: str
    dataset: str
    split: str
    read: Callable[[Mapping[str, Any]], list[Question]]
    columns: tuple[str, ...]
    scorer: Scorer
    prompt: str = SHORT
    metric: str = "accuracy"
    summary: Summary = Mean()
    max_new_tokens: int = 32
    config: str | None = None
    images: Images | None = None
    has_choices: bool = False
    words_column: str | None = None
    note: str | None = None  # what else decides the score

    def samples_of(self, row: Mapping[str, Any], number: int, prompt: str) -> list[Sample]:
        """What a row asks, in the words of a prompt.

        Args:
            number: of the row, from 0.
            prompt: `self.prompt`, or `prompt_with_words`.

        Raises:
            MissingValueError: the row lacks something.
        """
        samples = []
        for asked in self.read(row):
            words = ", ".join(texts_of(row, self.words_column)) if self.words_column and "{words}" in prompt else ""
            options = options_text(asked.choices)
            samples.append(
                Sample(
                    id=str(number) if asked.part is None else f"{number}.{asked.part}",
                    row=number,
                    prompt=prompt.format(question=asked.question, options=options, words=words),
                    answers=asked.answers,
                    choices=asked.choices,
                    stem=asked.question if asked.stem is None else asked.stem,
                    category=asked.category,
                    group=asked.group,
                    box=asked.box,
                    image=asked.image,
                )
            )
        return samples

    @property
    def prompt_with_words(self) -> str:
        """The prompt with what an OCR system read off the image.

        Raises:
            ConvLlavaError: the benchmark has no OCR tokens.
        """
        if self.words_column is None:
            raise ConvLlavaError(f"{self.title} has no OCR tokens, only TextVQA does: leave out --ocr-tokens.")
        return _WITH_WORDS


def _short(row: Mapping[str, Any], answers: str = "answers", category: str | None = None) -> list[Question]:
    kind = optional_text(row, category) or None if category else None
    return [Question(text_of(row, "question"), texts_of(row, answers), category=kind)]


def _people(row: Mapping[str, Any]) -> list[Question]:
    """VQA v2: an object for each of ten people's answers."""
    given = row.get("answers")
    if not isinstance(given, list | tuple) or not all(isinstance(one, Mapping) for one in given):
        raise MissingValueError(f"`answers` is {given!r:.80}; expected a list of objects with `answer`.")
    answers = texts_of({"answers": [one.get("answer") for one in given]}, "answers")
    return [Question(text_of(row, "question"), answers, category=optional_text(row, "answer_type") or None)]


def _chart(row: Mapping[str, Any]) -> list[Question]:
    return _short(row, "answer", "type")


def _gqa(row: Mapping[str, Any]) -> list[Question]:
    image = None if row.get("image") is not None else text_of(row, "imageId")
    return [Question(text_of(row, "question"), texts_of(row, "answer"), image=image)]


def _ocr(row: Mapping[str, Any]) -> list[Question]:
    answers = texts_of(row, "answer")
    if not all(answer.strip() for answer in answers):
        raise MissingValueError(f"`answer` is {answers!r:.80}; expected texts that are not empty.")
    return [Question(text_of(row, "question"), answers, category=text_of(row, "question_type"))]


def _yes_no(row: Mapping[str, Any]) -> str:
    answer = text_of(row, "answer").lower().rstrip(".")
    if answer not in ("yes", "no"):
        raise MissingValueError(f"`answer` is {answer!r:.80}; expected yes or no.")
    return answer


def _pope(row: Mapping[str, Any]) -> list[Question]:
    return [Question(text_of(row, "question"), (_yes_no(row),), category=optional_text(row, "category") or None)]


def _mme(row: Mapping[str, Any]) -> list[Question]:
    category, image = text_of(row, "category"), text_of(row, "question_id")
    question = text_of(row, "question").replace(" Please answer yes or no.", "")
    return [Question(question, (_yes_no(row),), category=category, group=f"{category}/{image}")]


def _mmbench(row: Mapping[str, Any]) -> list[Question]:
    choices = _lettered(row)
    index = text_of(row, "index")
    hint, question = optional_text(row, "hint"), text_of(row, "question")
    return [
        Question(
            f"{hint}\n{question}" if hint else question,
            (letter_of(row, "answer", choices),),
            choices,
            category=optional_text(row, "category") or None,
            group=str(int(index) % _ROTATION) if index.isdecimal() else index,
        )
    ]


def _lettered(row: Mapping[str, Any]) -> tuple[str, ...]:
    """The options in columns of their letters: two at least, and none behind one that is missing."""
    first = tuple(text_of(row, letter) for letter in "AB")
    others = [optional_text(row, letter) for letter in "CDE"]
    there = [text for text in others if text]
    if others[: len(there)] != there:
        raise MissingValueError(f"The options C, D and E are {others!r:.80}; expected none behind an empty one.")
    return (*first, *there)


def _seed(row: Mapping[str, Any]) -> list[Question]:
    if optional_text(row, "data_type") == "video":  # the paper's figures are of images
        return []
    choices = tuple(text_of(row, f"choice_{letter}") for letter in "abcd")
    kind = optional_text(row, "question_type_id") or None
    return [Question(text_of(row, "question"), (letter_of(row, "answer", choices),), choices, category=kind)]


def _real_world(row: Mapping[str, Any]) -> list[Question]:
    """The question holds the options and how to answer. Some questions have no options."""
    question, answer = text_of(row, "question"), text_of(row, "answer")
    found = _OPTION_LINE.findall(question)
    choices = tuple(text.strip() for _, text in found)
    if [letter for letter, _ in found] != list(LETTERS[: len(found)]) or answer not in dict(found):
        choices = ()
    stem = _OPTION_LINE.sub("", question).replace(_LETTERS_ONLY, "").strip() if choices else question
    return [Question(question, (answer,), choices, stem=stem)]


def _science(row: Mapping[str, Any]) -> list[Question]:
    choices = texts_of(row, "choices")
    hint, question = optional_text(row, "hint"), text_of(row, "question")
    asked = f"Context: {hint}\n{question}" if hint else question
    subject = optional_text(row, "subject") or None
    return [Question(asked, (letter_at(row.get("answer"), choices, "answer"),), choices, category=subject)]


def _diagram(row: Mapping[str, Any]) -> list[Question]:
    choices = texts_of(row, "options")
    return [Question(text_of(row, "question"), (letter_at(row.get("answer"), choices, "answer"),), choices)]


def _referred(row: Mapping[str, Any]) -> list[Question]:
    """A row has several sentences about an object, each a question of its own; its box is left, top, width, height."""
    box = row.get("bbox")
    if (
        not isinstance(box, list | tuple)
        or not all(isinstance(one, int | float) for one in box)
        or len(box) != 4
        or min(box[2:]) <= 0
    ):
        raise MissingValueError(f"`bbox` is {box!r:.80}; expected left, top, width and height in pixels.")
    left, top, width, height = map(float, box)
    corners = (left, top, left + width, top + height)
    sentences = texts_of(row, "answer")
    if not all(sentence.strip(" .") for sentence in sentences):
        raise MissingValueError(f"`answer` is {sentences!r:.80}; expected sentences that are not empty.")
    return [
        Question(sentence.strip(" ."), (sentence,), box=corners, part=part) for part, sentence in enumerate(sentences)
    ]


def _boxes(name: str, title: str, dataset: str) -> Benchmark:
    columns = ("answer", "bbox")
    return Benchmark(
        name, title, dataset, "val", _referred, columns, by_overlap, BOX, "accuracy at IoU 0.5", max_new_tokens=64
    )


def _options(name: str, title: str, dataset: str, split: str, read, columns, **more: Any) -> Benchmark:
    values = {"prompt": LETTER, "has_choices": True, **more}
    return Benchmark(name, title, dataset, split, read, columns, by_choice, **values)


_ALL = (
    Benchmark(
        "textvqa", "TextVQA", "lmms-lab/textvqa", "validation", _short, ("question", "answers"),
        by_answers(textvqa_accuracy), words_column="ocr_tokens",
    ),
    Benchmark(
        "docvqa", "DocVQA", "lmms-lab/DocVQA", "validation", _short, ("question", "answers"),
        by_answers(anls), metric="ANLS", summary=Mean(name="ANLS"), config="DocVQA", max_new_tokens=64,
    ),
    Benchmark(
        "chartqa", "ChartQA", "lmms-lab/ChartQA", "test", _chart, ("question", "answer", "type"),
        by_answers(relaxed_accuracy), metric="relaxed accuracy", summary=Mean(name="relaxed accuracy"),
    ),
    Benchmark(
        "infovqa", "InfoVQA", "lmms-lab/DocVQA", "validation", _short, ("question", "answers"),
        by_answers(anls), metric="ANLS", summary=Mean(name="ANLS"), config="InfographicVQA", max_new_tokens=64,
    ),
    Benchmark(
        "pope", "POPE", "lmms-lab/POPE", "test", _pope, ("question", "answer"), by_yes_no, metric="F1", summary=F1(),
        max_new_tokens=16,
    ),
    Benchmark(
        "mme", "MME", "lmms-lab/MME", "test", _mme, ("question", "answer", "category", "question_id"), by_yes_no,
        metric="perception score", summary=Mme(), max_new_tokens=16,
    ),
    _options(
        "mmbench", "MMBench", "lmms-lab/MMBench", "dev", _mmbench, ("index", "question", "answer", "A", "B"),
        config="en", note="CircularEval",
    ),
    _options(
        "seed", "SEED", "lmms-lab/SEED-Bench", "test", _seed,
        ("question", "answer", "choice_a", "choice_b", "choice_c", "choice_d"), note="images alone",
    ),
    _options(
        "realworldqa", "RealWorldQA", "lmms-lab/RealWorldQA", "test", _real_world, ("question", "answer"),
        prompt="{question}",
    ),
    _options(
        "scienceqa", "ScienceQA", "lmms-lab/ScienceQA", "test", _science, ("question", "choices", "answer"),
        config="ScienceQA-IMG", note="questions with images",
    ),
    _options("ai2d", "AI2D", "lmms-lab/ai2d", "test", _diagram, ("question", "options", "answer")),
    Benchmark(
        "vqav2", "VQAv2", "lmms-lab/VQAv2", "validation", _people, ("question", "answers"), by_answers(vqa_accuracy)
    ),
    Benchmark(
        "gqa", "GQA", "lmms-lab/GQA", "testdev", _gqa, ("question", "answer"), by_answers(exact_match),
        config="testdev_balanced_instructions", images=Images("testdev_balanced_images", "testdev"),
    ),
    _boxes("refcoco", "RefCOCO", "lmms-lab/RefCOCO"),
    _boxes("refcoco+", "RefCOCO+", "lmms-lab/RefCOCOplus"),
    _boxes("refcocog", "RefCOCOg", "lmms-lab/RefCOCOg"),
    Benchmark(
        "ocrbench", "OCRBench", "echo840/OCRBench", "test", _ocr, ("question", "answer", "question_type"),
        by_containment, prompt="{question}", max_new_tokens=128,
    ),
)  # fmt: skip
BENCHMARKS = {benchmark.name: benchmark for benchmark in _ALL}


def find_benchmark(name: str) -> Benchmark:
    """A benchmark by its name, in upper or lower case.

    Raises:
        ConvLlavaError: there is none of that name.
    """
    found = BENCHMARKS.get(name.strip().lower())
    if found is None:
        raise ConvLlavaError(f"There is no benchmark {name!r}: choose one of {', '.join(BENCHMARKS)}.")
    return found
