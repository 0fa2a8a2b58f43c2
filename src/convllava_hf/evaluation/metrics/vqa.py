"""VQA accuracy with the official normalization of answers, and exact match after it.

Definitions: Antol et al., "VQA: Visual Question Answering" (arXiv 1505.00468); the evaluation code and the
rules at visualqa.org/evaluation. TextVQA's own evaluator (EvalAI's, in facebookresearch/mmf) splits words first.
"""

import re
from collections.abc import Sequence

from .answers import check_answers


# Each is the correction of every spelling that lacks exactly one of its apostrophes, as in the official table.
_CONTRACTIONS = """
ain't aren't can't could've couldn't couldn't've didn't doesn't don't hadn't hadn't've hasn't haven't he'd he'd've he's
how'd how'll how's isn't it'd it'd've it'll ma'am might've mightn't mightn't've must've mustn't needn't not've o'clock
oughtn't 'ow's'at shan't she'd've should've shouldn't shouldn't've somebody'd've somebody'll somebody's someone'd
someone'd've someone'll someone's something'd something'd've something'll that's there'd there'd've there're there's
they'd they'd've they'll they're they've 'twas wasn't we'd've we've weren't what'll what're what's what've when's
where'd where's where've who'd who'd've who'll who's who've why'll why're why's won't would've wouldn't wouldn't've
y'all y'all'll y'all'd've you'd you'd've you'll you're you've
""".split()
_APOSTROPHES = {
    word[:index] + word[index + 1 :]: word
    for word in _CONTRACTIONS
    for index, character in enumerate(word)
    if character == "'"
} | {"somebody'd": "somebodyd"}  # the official table has this one the wrong way round
_NUMBERS = {"none": "0"} | {
    word: str(number) for number, word in enumerate("zero one two three four five six seven eight nine ten".split())
}
_ARTICLES = ("a", "an", "the")
_PUNCTUATION = ';/[]"{}()=+\\_-><@`,?!'
_THOUSANDS = re.compile(r"\d,\d")
_PERIOD = re.compile(r"\.(?!\d)")
# The official code hands re.UNICODE, which is 32, to re.sub in the place of the greatest number of replacements.
_PERIODS_REMOVED = int(re.UNICODE)
_LEAST_ANSWERS = 4  # with fewer, leaving one out, no prediction could agree with three


def normalize_vqa(text: str) -> str:
    """The official normalization of VQA v2: punctuation, number words up to ten, articles, apostrophes, lower case.

    Punctuation becomes a blank, or nothing where the same mark is next to a blank or the text has a comma between
    digits. Periods go unless a digit follows. Apostrophes and colons stay.
    """
    text = text.replace("\n", " ").replace("\t", " ").strip()
    grouped = _THOUSANDS.search(text) is not None
    cleaned = text
    for mark in _PUNCTUATION:
        beside_blank = f"{mark} " in text or f" {mark}" in text
        cleaned = cleaned.replace(mark, "" if beside_blank or grouped else " ")
    cleaned = _PERIOD.sub("", cleaned, count=_PERIODS_REMOVED)
    words = (_NUMBERS.get(word, word) for word in cleaned.lower().split())
    return " ".join(_APOSTROPHES.get(word, word) for word in words if word not in _ARTICLES)


def vqa_accuracy(prediction: str, answers: Sequence[str]) -> float:
    """How far people agree with a prediction: min(matches / 3, 1) among the others, averaged over who is left out.

    Prediction and answers are normalized by `normalize_vqa`. What normalization leaves nothing of ("the") matches an
    empty prediction, as in the official code.

    Args:
        answers: of ten people in VQA v2, TextVQA and their like.

    Raises:
        ConvLlavaError: fewer than four answers: no prediction could then be right.
    """
    check_answers(answers, _LEAST_ANSWERS)
    return _agreement(normalize_vqa(prediction), [normalize_vqa(answer) for answer in answers])


def textvqa_accuracy(prediction: str, answers: Sequence[str]) -> float:
    """`vqa_accuracy` as TextVQA's own evaluator (mmf's EvalAI processor, LLaVA, lmms-eval) counts it.

    It drops commas and question marks and parts `'s` from its word before it normalizes: `red,blue` becomes
    `redblue` there, and `red blue` in `vqa_accuracy`, which is what VLMEvalKit and so the paper's table go by.
    """
    check_answers(answers, _LEAST_ANSWERS)
    return _agreement(normalize_vqa(_split_words(prediction)), [normalize_vqa(_split_words(a)) for a in answers])


def exact_match(prediction: str, answers: Sequence[str]) -> float:
    """1.0 if a prediction is one of the answers after `normalize_vqa`, else 0.0: GQA's accuracy (arXiv 1902.09506).

    Where normalization leaves nothing of a text, the text itself is compared, in lower case: an empty prediction is
    not the answer `a`.
    """
    check_answers(answers)
    return float(_normalized_or_itself(prediction) in map(_normalized_or_itself, answers))


def _agreement(prediction: str, answers: Sequence[str]) -> float:
    matches = answers.count(prediction)
    # A person who gave the same answer has one match less among the others.
    same, different = min(1.0, max(matches - 1, 0) / 3), min(1.0, matches / 3)
    return (matches * same + (len(answers) - matches) * different) / len(answers)


def _split_words(text: str) -> str:
    return text.lower().replace(",", "").replace("?", "").replace("'s", " 's").strip()


def _normalized_or_itself(text: str) -> str:
    return normalize_vqa(text) or text.strip().lower()
