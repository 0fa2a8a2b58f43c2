"""Small tokenizers with the special tokens and the chat templates of today's language models.

The templates are those that TRL stores to recognize the families by, read from the installed package, along with its
training variants of them.
"""

from pathlib import Path

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast


# As Mistral 7B Instruct v0.2 has it, which TRL does not store.
MISTRAL = (
    "{{ bos_token }}{% for message in messages %}{% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('Conversation roles must alternate user/assistant/user/assistant/...') }}{% endif %}"
    "{% if message['role'] == 'user' %}{{ '[INST] ' + message['content'] + ' [/INST]' }}"
    "{% elif message['role'] == 'assistant' %}{{ message['content'] + eos_token}}"
    "{% else %}{{ raise_exception('Only user and assistant roles are supported!') }}{% endif %}{% endfor %}"
)
_KINDS = {
    "qwen": {
        "special": ["<|endoftext|>", "<|im_start|>", "<|im_end|>"],
        "named": {"eos_token": "<|im_end|>", "pad_token": "<|endoftext|>"},
    },
    "llama3": {
        "special": ["<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"],
        "named": {"bos_token": "<|begin_of_text|>", "eos_token": "<|eot_id|>"},
    },
    "gemma": {
        "special": ["<pad>", "<eos>", "<bos>", "<start_of_turn>", "<end_of_turn>"],
        "named": {"bos_token": "<bos>", "eos_token": "<eos>", "pad_token": "<pad>"},
    },
    "phi3": {
        "special": ["<s>", "<|endoftext|>", "<|user|>", "<|assistant|>", "<|system|>", "<|end|>"],
        "named": {"bos_token": "<s>", "eos_token": "<|endoftext|>", "pad_token": "<|endoftext|>"},
    },
    "mistral": {
        "special": ["<unk>", "<s>", "</s>", "[INST]", "[/INST]"],
        "named": {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"},
    },
}
FAMILIES = {
    "qwen2_5": "qwen",
    "qwen3": "qwen",
    "qwen3_instruct_2507": "qwen",
    "llama3": "llama3",
    "llama3_1": "llama3",
    "llama3_2": "llama3",
    "gemma": "gemma",
    "gemma3": "gemma",
    "phi3": "phi3",
    "phi3_5": "phi3",
    "mistral": "mistral",
}
NO_TEMPLATE = "vicuna"


def stored_template(name: str) -> str:
    """One of TRL's files."""
    import trl

    return (Path(trl.__file__).parent / "chat_templates" / f"{name}.jinja").read_text(encoding="utf-8")


def family_tokenizer(name: str) -> PreTrainedTokenizerFast:
    """The tokenizer of a family, with its own template; of `NO_TEMPLATE`, Mistral's without any."""
    kind = _KINDS[FAMILIES.get(name, "mistral")]
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=330, special_tokens=kind["special"], initial_alphabet=pre_tokenizers.ByteLevel.alphabet()
    )
    backend.train_from_iterator(["user assistant system model What is on the sign? A red bus."] * 3, trainer)
    if (bos := kind["named"].get("bos_token")) is not None:
        backend.post_processor = processors.TemplateProcessing(
            single=f"{bos} $A", pair=f"{bos} $A {bos} $B", special_tokens=[(bos, backend.token_to_id(bos))]
        )
    others = [token for token in kind["special"] if token not in kind["named"].values()]
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, additional_special_tokens=others, model_max_length=2048, **kind["named"]
    )
    if name != NO_TEMPLATE:
        tokenizer.chat_template = MISTRAL if name == "mistral" else stored_template(name)
    return tokenizer
