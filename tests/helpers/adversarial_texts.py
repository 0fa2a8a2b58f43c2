"""Answers as models give them at their worst, for the tests of metrics: the same ones every time."""

import itertools
import random


WRITTEN = [
    "", " ", "\n", "\t \n", ".", "...", "." * 40 + "5", "?", "the", "The", "a", "an", "A", "none", "None.",
    "zero", "ten", "two dogs", "Two dogs.", "2 dogs", "the two dogs", "a dog", "A dog!", "an  apple", "dog's",
    "dogs", "dog 's", "dont", "don't", "Don't", "couldntve", "couldn'tve", "couldnt've", "somebody'd", "twas",
    "oclock", "10 o'clock", "10:30", "10.30", "10,000", "1,000,000", "1.000.000", "10, 000", "1,000-mile",
    "$5.99", "$ 5.99", "5.99$", "5 .99", "3.", ".5", "-5", "+5", "5-", "- 5", "5%", "5 %", "5.0%", "%", "%%",
    "5%%", "0", "0.0", "-0", "0%", "00", "007", "nan", "NaN", "inf", "-inf", "Infinity", "1e3", "1E3", "1e400",
    "1_000", "0x10", "½", "٣", "５", "²", "five", "red,blue", "red, blue", "red ,blue", "red and blue",
    "red/blue", "red / blue", "red-blue", "red_blue", "(red)", "[red]", "{red}", "<red>", "`red`", "\"red\"",
    "'red'", "red;", "red:", "red@blue", "red=blue", "red\\blue", "red!", "red\nblue", "red\tblue", "red  blue",
    "RED", "Red.", "red.blue", "r.e.d", "U.S.A.", "U.S.A", "Mr. Red", "naïve café", "CAFÉ", "straße", "STRASSE",
    "İstanbul", "ﬁre", "日本", "日本語", "ＡＢＣ", "ａｂｃ　１２", "🙂", "🙂🙃", "e\u0301", "é", "\u200b",
    "red\u200b", "\u00a0red", "rtl \u202etext", "\x00", "\ufeffred", "Ω", "ω", "ς", "Σ", "12 cm", "12cm",
    "12 km/h", "12 kg", "twelve", "12.0", "12.00001", "11.4", "11.39", "12.6", "12.61", "about 12", "yes",
    "Yes", "YES.", "yes, it is", "no", "No.", "no, yes", "yes and no", "not sure", "y", "n", "nope", "yeah",
    "x^{2}", "x ^ { 2 }", "\\frac { 1 } { 2 }", "\\frac{1}{2}", "X^{2}", "The answer is 12.",
    "I think it is red", "it says: red blue", "unanswerable", "I don't know", "a" * 300, "the " * 50,
]  # fmt: skip
_PIECES = [
    "a", "an", "the", "one", "two", "Ten", "none", "dog", "Dogs", "red", "Blue", "cafe", "don't", "dont",
    "youve", "it's", "1,000", "3.5", ".", ",", "?", "!", "-", "/", "'", "\"", "%", "12", "12.0", "cm", "é",
    "日", "\n", "(", ")", "yes", "no",
]  # fmt: skip


def texts(count: int, seed: int = 0) -> list[str]:
    """The ones written above, and as many put together at random as make up the number."""
    rng = random.Random(seed)
    made = []
    while len(WRITTEN) + len(made) < count:
        glue = rng.choice(["", " ", " ", "  "])
        made.append(glue.join(rng.choices(_PIECES, k=rng.randint(1, 6))))
    return WRITTEN + made


def answer_lists(predictions: list[str], size: int, seed: int = 0) -> list[list[str]]:
    """For each prediction a list of answers: itself as often as comes, others, and itself changed a little."""
    rng = random.Random(seed)
    lists = []
    for prediction in predictions:
        near = [
            prediction,
            prediction.upper(),
            f" {prediction}",
            f"{prediction}.",
            f"the {prediction}",
            prediction[1:],
        ]
        lists.append([rng.choice(near) if rng.random() < 0.5 else rng.choice(predictions) for _ in range(size)])
    return lists


_BOXES = [
    "", "no box", "[]", "[ ]", "[0.1, 0.2, 0.3, 0.4]", "[0.1,0.2,0.3,0.4]", "[ 0.1, 0.2, 0.3, 0.4 ]", "[0,0,1,1]",
    "[100, 200, 300, 400]", "[-0.1, 0.2, 1.3, 0.4]", "[0.3, 0.4, 0.1, 0.2]", "[0.1, 0.1, 0.1, 0.1]", "[0.1, 0.2, 0.3]",
    "[0.1, 0.2, 0.3, 0.4, 0.5]", "[0.1, 0.2, 0.3, 0.4", "0.1, 0.2, 0.3, 0.4]", "0.1, 0.2, 0.3, 0.4",
    "[0.1 0.2 0.3 0.4]", "[a, b, c, d]", "[0.1, 0.2, x, 0.4]", "[0.1,, 0.3, 0.4]", "[0.1,\n0.2,\n0.3,\n0.4]",
    "[0.1, 0.2, 0.3, 0.4] and [0.5, 0.6, 0.7, 0.8]", "It is at [0.25, 0.50, 0.75, 1.00].", "[1e999, 0, 1, 1]",
    '{"bbox": [0.1, 0.2, 0.3, 0.4]}', '{"bbox": [0.1, 0.2, 0.3, 0.4}', '{"bbox": [', "[0.1, 0.2, 0.3, 0.4],",
    "[[0.1, 0.2, 0.3, 0.4], [0.5, 0.6, 0.7, 0.8]]", "[0.1, 0.2, 0.3, 0.4][0.5, 0.6, 0.7, 0.8]", "[nan, 0, 1, 1]",
    "[inf, 0, 1, 1]", "[0..1, 0.2, 0.3, 0.4]", "[0.1, 0.2, 0.3, 0.4%]", "［0.1, 0.2, 0.3, 0.4］", "[٠, ١, ٢, ٣]",
    "[- 0.1, 0.2, 0.3, 0.4]", "[--1, 0.2, 0.3, 0.4]", "(0.1, 0.2)", "x" * 500, "[" * 50, "[0.1, 0.2, 0.3, 0.4]" * 20,
]  # fmt: skip


def box_texts(seed: int = 0) -> list[str]:
    """Boxes in and out of range, several, none, and what is no box."""
    rng = random.Random(seed)
    made = []
    for digits, largest in itertools.product((0, 1, 2, 3), (1, 1.2, 1000)):
        for _ in range(15):
            count = rng.choice([3, 4, 4, 4, 5])
            numbers = ", ".join(f"{rng.uniform(-0.1 * largest, largest):.{digits}f}" for _ in range(count))
            made.append(rng.choice(["[{}]", "Here: [{}].", '{{"bbox_2d": [{}]}}', "[{}", "{}]"]).format(numbers))
    return _BOXES + made
