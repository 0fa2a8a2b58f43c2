"""Models with scripted answers for the tests of the web page, and the page's screenshot.

The answers are forced token by token into the tiny model's own generation, so streaming, stopping and counting
are real.
"""

import contextlib
import time

from transformers import LogitsProcessor, LogitsProcessorList

from convllava_hf.inference import Assistant
from helpers.tiny_models import make_config, make_model, make_processor


BOXES = "A blue mug at [0.41, 0.44, 0.65, 0.70] and a red ball at [0.12, 0.55, 0.31, 0.72]."
PLAIN = "The sign says HARBOUR STREET.\nBelow it: City center, 3 km."
LONG = "on and " * 120


class _Script(LogitsProcessor):
    def __init__(self, tokens: list[int], prompt_tokens: int, seconds_a_token: float):
        self.tokens, self.prompt_tokens, self.seconds = tokens, prompt_tokens, seconds_a_token

    def __call__(self, input_ids, scores):
        time.sleep(self.seconds)
        scores[:] = float("-inf")
        scores[:, self.tokens[input_ids.shape[1] - self.prompt_tokens]] = 0.0
        return scores


class ScriptedModel:
    """Answers by what the conversation's last question says: `box`, `long`, `break`; else `PLAIN`."""

    def __init__(self, model, tokenizer, seconds_a_token: float = 0.0):
        self.model, self.tokenizer, self.seconds_a_token = model, tokenizer, seconds_a_token
        self.prompts: list[str] = []  # as the model got them
        self.generated = 0  # tokens of the latest answer
        self.generating = 0

    def __getattr__(self, name):
        return getattr(self.model, name)

    def generate(self, input_ids, **kwargs):
        prompt = self.tokenizer.decode(input_ids[0])
        self.prompts.append(prompt)
        question = prompt.rpartition("USER: ")[2]
        if "break" in question:
            raise RuntimeError("a fault with a /secret/path in it")
        text = BOXES if "box" in question else LONG if "long" in question else PLAIN
        tokens = [*self.tokenizer(text, add_special_tokens=False).input_ids, self.tokenizer.eos_token_id]
        script = _Script(tokens, input_ids.shape[1], self.seconds_a_token)
        with self._counting():
            output = self.model.generate(input_ids, logits_processor=LogitsProcessorList([script]), **kwargs)
        self.generated = output.sequences.shape[1] - input_ids.shape[1]
        return output

    @contextlib.contextmanager
    def _counting(self):
        self.generating += 1
        try:
            yield
        finally:
            self.generating -= 1


def scripted_assistant(side: int = 128, context: int = 4096, seconds_a_token: float = 0.0) -> Assistant:
    config = make_config()
    config.text_config.max_position_embeddings = context
    model = make_model(config)
    model.generation_config.suppress_tokens = None
    processor = make_processor(side)
    return Assistant(ScriptedModel(model, processor.tokenizer, seconds_a_token), processor)
