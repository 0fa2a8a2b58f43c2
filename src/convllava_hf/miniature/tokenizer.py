"""The miniature's tokenizer and chat template."""

import itertools
from collections.abc import Iterator

import numpy as np
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from .language import Mix, conversation, text_image
from .world import World


# Vicuna's roles without its system message, which would be longer than the conversations here.
CHAT_TEMPLATE = (
    "{{- bos_token -}}"
    "{%- for message in messages -%}"
    "{%- if message['role'] == 'assistant' -%}"
    "{{- 'ASSISTANT:' -}}{%- generation -%}{{- ' ' + message['content'] + eos_token -}}{%- endgeneration -%}"
    "{%- else -%}{{- 'USER: ' + message['content'] + ' ' -}}{%- endif -%}"
    "{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{- 'ASSISTANT:' -}}{%- endif -%}"
)
# Words, coordinates with the sign beside them, digits, other signs: each with the blank before it. So a box is four
# tokens, and a token says which edge it is.
_PIECES = r" ?[A-Za-z]+| ?\[?\d\.\d\d[,\]]?| ?\d| ?[^\sA-Za-z\d]|\s"


def make_tokenizer(world: World | None = None) -> PreTrainedTokenizerFast:
    """A byte-level tokenizer that can write everything and has one token for each word of the miniature world."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(_PIECES), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=2000,
        min_frequency=2,
        special_tokens=["<pad>", "<s>", "</s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(_texts(world or World(), 3000), trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<s>",
        eos_token="</s>",
        pad_token="<pad>",
        padding_side="left",
        model_max_length=1024,
        model_input_names=["input_ids", "attention_mask"],
        chat_template=CHAT_TEMPLATE,
        clean_up_tokenization_spaces=False,
    )


def _texts(world: World, scenes: int) -> Iterator[str]:
    """Everything that is said, first and later in a conversation: with a line break or a blank before the question."""
    rng = np.random.default_rng(0)
    for scene in itertools.islice(world.scenes("train", seed=0), scenes):
        for question, answer in conversation(scene, rng, Mix(0.2, 0.2, 0.3)):
            words = " ".join(itertools.chain(*text_image(scene)))
            yield f"USER: {words}\n{question} ASSISTANT: {answer}"
            yield f"USER: {question} ASSISTANT: {answer}"
