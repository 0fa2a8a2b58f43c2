"""ConvLLaVA for VLMEvalKit, which has no plug-in point: register the class in a script next to its `run.py`.

    from functools import partial

    import run  # first: it gives each process its GPUs
    from convllava_hf.evaluation.vlmevalkit import ConvLlava

    run.supported_VLM["ConvLLaVA-1536"] = partial(ConvLlava, model_path="ConvLLaVA-1536")
    run.load_env()
    run.main()

The script is called as `run.py` is: `python run_convllava.py --data MMBench_DEV_EN --model ConvLLaVA-1536`.

VLMEvalKit's interface: `vlmeval.vlm.base.BaseModel`. A message is a list of dicts, `{"type": "image", "value": PATH}`
or `{"type": "text", "value": TEXT}`. Questions are asked one at a time; `convllava eval` and lmms-eval ask in batches.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from vlmeval.vlm.base import BaseModel  # pyright: ignore[reportMissingImports]

from ..errors import ConvLlavaError
from ..inference import assistant_turn, load, open_image, system_turn, user_turn
from .benchmarks import LETTER
from .engine import answer_batch
from .samples import LETTERS


class ConvLlava(BaseModel):
    """A checkpoint as VLMEvalKit asks it.

    Args:
        model_path: folder of a checkpoint or its id on the Hub.
        max_new_tokens: an answer ends there if the model has not ended it before.
        image_options: how large images are seen, where not as the checkpoint says: arguments of
            `ConvLlavaImageProcessor`, such as `{"preset": "large"}`.
        **loading: other arguments of `convllava_hf.inference.load`, such as `device`.

    Raises:
        ConvLlavaError: the checkpoint cannot be loaded.
    """

    INSTALL_REQ = False
    INTERLEAVE = True  # images may come between texts
    allowed_types = ["text", "image"]

    def __init__(
        self,
        model_path: str,
        max_new_tokens: int = 512,
        image_options: Mapping[str, Any] | None = None,
        **loading: Any,
    ):
        super().__init__()
        self.assistant = load(model_path, image_options=image_options, **loading)
        self.max_new_tokens = max_new_tokens

    def use_custom_prompt(self, dataset: str) -> bool:
        """Multiple choice is asked as LLaVA-1.5 was trained to answer it; for the rest, VLMEvalKit's prompts do."""
        from vlmeval.dataset import DATASET_TYPE  # pyright: ignore[reportMissingImports]

        return DATASET_TYPE(dataset) == "MCQ"

    def build_prompt(self, line: Mapping[str, Any], dataset: str | None = None) -> list[dict[str, str]]:
        """The message of a row with `question`, perhaps a `hint`, and options in columns `A`, `B`, ..."""
        paths = self.dump_image(line, dataset)
        text = "\n".join(str(line[name]) for name in ("hint", "question") if _is_there(line, name))
        options = [f"{letter}. {line[letter]}" for letter in LETTERS if _is_there(line, letter)]
        if options:
            text = LETTER.format(question=text, options="\n".join(options))
        images = [{"type": "image", "value": path} for path in ([paths] if isinstance(paths, str) else paths)]
        return [*images, {"type": "text", "value": text}]

    def generate_inner(self, message: Sequence[Mapping[str, str]], dataset: str | None = None) -> str:
        """The answer to one message."""
        return self._answer([_turn("user", message)])

    def chat_inner(self, messages: Sequence[Mapping[str, Any]], dataset: str | None = None) -> str:
        """The next answer of a conversation: dicts of `role` and `content`, which is a message."""
        return self._answer([_turn(message["role"], message["content"]) for message in messages])

    def _answer(self, turns: list[dict[str, Any]]) -> str:
        return answer_batch(self.assistant, [turns], max_new_tokens=self.max_new_tokens)[0].text


def _turn(role: str, message: Sequence[Mapping[str, str]]) -> dict[str, Any]:
    if unknown := sorted({part["type"] for part in message} - {"text", "image"}):
        raise ConvLlavaError(f"A message holds {', '.join(unknown)}, and ConvLLaVA reads texts and images.")
    if role != "user":
        text = "\n".join(part["value"] for part in message if part["type"] == "text")
        return {"system": system_turn, "assistant": assistant_turn}[role](text)
    content = [
        {"type": "text", "text": part["value"]}
        if part["type"] == "text"
        else {"type": "image", "image": open_image(part["value"])}
        for part in message
    ]
    return {**user_turn(""), "content": content}


def _is_there(line: Mapping[str, Any], name: str) -> bool:
    """Whether a row has a value in a column; pandas writes nan, which is not itself, for none."""
    return name in line and line[name] is not None and line[name] == line[name]
