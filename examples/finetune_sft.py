"""Fine-tune ConvLLaVA on your own images with TRL's `SFTTrainer`: LoRA on the language model, and the whole projector.

    pip install '.[train]'
    convllava convert ConvLLaVA/ConvLLaVA-sft-1536 ConvLLaVA-1536
    python examples/finetune_sft.py
    convllava ask finetuned photo.jpg "What is on the sign?"

Each line of `samples.jsonl` is one sample; paths of images are relative to the folder in which you run the script:
{"image": "photo.jpg", "question": "What is on the sign?", "answer": "Harbor Street"}
"""

import torch
from datasets import Image, List, load_dataset
from peft import LoraConfig
from trl import SFTConfig, SFTTrainer

import convllava_hf  # noqa: F401  registers ConvLLaVA with transformers' Auto classes


def to_conversation(sample: dict) -> dict:
    question = [{"type": "image"}, {"type": "text", "text": sample["question"]}]
    answer = [{"type": "text", "text": sample["answer"]}]
    messages = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
    return {"images": [sample["image"]], "messages": messages}


dataset = load_dataset("json", data_files="samples.jsonl", split="train")
dataset = dataset.map(to_conversation, remove_columns=dataset.column_names).cast_column("images", List(Image()))

config = SFTConfig(
    "finetuned",
    max_length=None,  # the default would cut off visual tokens
    assistant_only_loss=True,
    num_train_epochs=3,
    learning_rate=1e-4,
    per_device_train_batch_size=4,
    logging_steps=1,
    bf16=torch.cuda.is_available(),
    model_init_kwargs={"dtype": "bfloat16"},
    report_to="none",
)
lora = LoraConfig(
    r=64,
    lora_alpha=128,
    # Not "all-linear", which would also take layers of the vision tower.
    target_modules=r".*language_model.*\.(q_proj|k_proj|v_proj|o_proj|gate_proj|up_proj|down_proj)",
    modules_to_save=["multi_modal_projector"],
)
trainer = SFTTrainer("ConvLLaVA-1536", config, train_dataset=dataset, peft_config=lora)
trainer.train()

trainer.model.merge_and_unload().save_pretrained("finetuned")
trainer.processing_class.save_pretrained("finetuned")
