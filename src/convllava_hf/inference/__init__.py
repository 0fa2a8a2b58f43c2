"""Load a ConvLLaVA and ask it: what `convllava ask`, `chat`, `demo` and `eval` share, usable from Python as well.

>>> assistant = load("path/to/convllava")
>>> image = open_image("photo.jpg")
>>> assistant.answer([user_turn("What is on the sign?", [image])], on_text=show).text
"""

from .assistant import GREEDY, LESS_MEMORY, Answer, Assistant, load, prompt_inputs
from .messages import assistant_turn, open_image, system_turn, user_turn


__all__ = [
    "GREEDY",
    "LESS_MEMORY",
    "Answer",
    "Assistant",
    "assistant_turn",
    "load",
    "open_image",
    "prompt_inputs",
    "system_turn",
    "user_turn",
]
