"""What all metrics ask of the answers that people gave."""

from collections.abc import Sequence

from ...errors import ConvLlavaError


def check_answers(answers: Sequence[str], least: int = 1) -> None:
    """Refuses answers that no prediction could be compared with.

    Raises:
        ConvLlavaError: `answers` is one text instead of several, has fewer than `least`, or holds something else.
    """
    if isinstance(answers, str):
        raise ConvLlavaError(f"answers is the text {answers!r}, and a list of texts is expected: [{answers!r}].")
    if len(answers) < least:
        raise ConvLlavaError(
            f"There are {len(answers)} answers, and this metric needs {least} at least. Leave the sample out, or take "
            "another metric."
        )
    for answer in answers:
        if not isinstance(answer, str):
            raise ConvLlavaError(f"The answer {answer!r} is a {type(answer).__name__}, and a text is expected.")
