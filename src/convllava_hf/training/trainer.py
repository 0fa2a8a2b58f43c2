"""`SFTTrainer` with what ConvLLaVA needs: learning rates by part, an order by modality, bad images handled."""

import logging
from pathlib import Path

import torch
from accelerate.utils import is_peft_model
from torch import nn
from torch.utils.data import Sampler
from transformers.integrations import is_deepspeed_zero3_enabled
from trl import SFTTrainer

from ..data.collator import SafeImageCollator
from ..options import mode_of
from .disk import checkpoint_bytes, reporting_full_disk, warn_if_low_on_space
from .optimizer import parameter_groups
from .sampler import ModalityLengthSampler
from .shapes import Shapes, image_shapes, max_grid


logger = logging.getLogger(__name__)

_CHARACTERS_PER_TOKEN = 4  # about; only used for grouping by length
_NEVER = -1e4  # a logit whose probability is zero in every floating-point format


class ConvLlavaTrainer(SFTTrainer):
    """TRL's trainer; its arguments are `TrainingArguments` of this package.

    Args:
        on_bad_image, max_bad_images, on_bad_sample, max_bad_samples: see `DataArguments`.
    """

    def __init__(
        self,
        *args,
        on_bad_image: str = "error",
        max_bad_images: int = 100,
        on_bad_sample: str = "error",
        max_bad_samples: int = 100,
        **kwargs,
    ):
        super().__init__(*args, **kwargs)
        if not (self.is_fsdp_enabled or is_deepspeed_zero3_enabled()):  # TRL gathers the whole head then, and a bias
            tokenizer = self.processing_class.tokenizer
            unused = set(range(len(tokenizer), self.model.config.get_text_config().vocab_size))
            if self.args.assistant_only_loss:  # else the loss covers prompts, placeholders included
                unused.add(self.processing_class.image_token_id)
            mask_unused_logits(self.accelerator.unwrap_model(self.model).get_output_embeddings(), unused)
            if is_peft_model(self.model) and not getattr(self.model, "is_quantized", False):
                upcast_trainable_params(self.model)
        plain = self.data_collator
        self.data_collator = SafeImageCollator(
            plain, self.train_dataset, on_bad_image, max_bad_images, on_bad_sample, max_bad_samples
        )
        # A sample that the loss is measured on is never replaced by one of the training data.
        self.eval_data_collator = SafeImageCollator(plain, self.eval_dataset, policy="error")

    def create_optimizer(self, model=None):
        if self.optimizer is None:
            source = self.model if model is None else model
            optimizer_class, options = self.get_optimizer_cls_and_kwargs(self.args, source)
            groups = parameter_groups(
                source.named_parameters(),
                set(self.get_decay_parameter_names(source)),
                self.args.weight_decay,
                self.args.projector_learning_rate,
                self.args.vision_tower_learning_rate,
            )
            # transformers takes the groups from here, and keeps bitsandbytes' states of embeddings in 32 bits.
            self.optimizer_cls_and_kwargs = (optimizer_class, {**options, "params": groups})
        return super().create_optimizer(model)

    def get_eval_dataloader(self, eval_dataset=None):
        collator, self.data_collator = self.data_collator, self.eval_data_collator
        try:
            return super().get_eval_dataloader(eval_dataset)
        finally:
            self.data_collator = collator

    def _get_train_sampler(self, train_dataset=None) -> Sampler | None:
        dataset = self.train_dataset if train_dataset is None else train_dataset
        if not self.args.group_by_modality_length or not hasattr(dataset, "__len__"):
            return super()._get_train_sampler(dataset)
        shapes = None
        image_processor = self.processing_class.image_processor
        if self.args.group_by_image_shape and not mode_of(image_processor.image_sizing()).square:
            with self.args.main_process_first(desc="reading the sizes of images"):
                shapes = image_shapes(dataset, image_processor, self.args.dataset_num_proc)
        lengths, has_image = sample_lengths(dataset, self.processing_class, shapes)
        rooms = None if shapes is None else [max_grid(images) for images in shapes]
        step = self.args.train_batch_size * self.accelerator.num_processes
        seed = self.args.data_seed if self.args.data_seed is not None else self.args.seed
        return ModalityLengthSampler(lengths, has_image, step, seed, rooms)

    def _set_signature_columns_if_needed(self):
        super()._set_signature_columns_if_needed()
        self._signature_columns += [name for name in ("sample", "boxes") if name not in self._signature_columns]

    def create_model_card(self, *args, **kwargs):
        """Does nothing: TRL's generic card says nothing about the model."""

    def train(self, *args, **kwargs):
        if self.args.save_strategy != "no" and self.is_world_process_zero():
            warn_if_low_on_space(self.args.output_dir, self._checkpoint_bytes())
        return super().train(*args, **kwargs)

    def _save_checkpoint(self, model, trial):
        folder = Path(self._get_output_dir(trial=trial)) / f"checkpoint-{self.state.global_step}"
        with reporting_full_disk(folder, self._checkpoint_bytes):
            super()._save_checkpoint(model, trial)

    def _checkpoint_bytes(self, states: bool = True) -> int:
        model = self.accelerator.unwrap_model(self.model)
        states = states and not self.args.save_only_model
        return checkpoint_bytes(model, adapter=is_peft_model(model), states=states, optimizer=self.optimizer)

    def save_model(self, output_dir=None, _internal_call=False):
        folder = output_dir or self.args.output_dir
        with reporting_full_disk(folder, lambda: self._checkpoint_bytes(states=_internal_call)):
            super().save_model(output_dir, _internal_call)

    def _save(self, output_dir=None, state_dict=None):
        card = Path(output_dir or self.args.output_dir) / "README.md"
        was_there = card.exists()
        super()._save(output_dir, state_dict)
        if not was_there:
            card.unlink(missing_ok=True)  # PEFT's generic one


def mask_unused_logits(head: nn.Linear, unused: set[int]) -> None:
    """Leaves rows of the language model's head out of the distribution that is trained.

    `<image>` and the rows that pad the vocabulary are never generated, so probability given to them would only be a
    loss that cannot be learned away quickly: with 64 such rows and 640 tokens it is 0.05, with Vicuna's 0.002. The
    head gets a bias that is no parameter and is not saved. Where parameters are sharded, TRL expects a bias to be
    sharded too, so there the rows stay in.

    Args:
        head: (vocabulary, hidden size), without a bias.
        unused: rows to leave out.
    """
    bias = torch.zeros(head.weight.shape[0], device=head.weight.device, dtype=head.weight.dtype)
    bias[sorted(unused)] = _NEVER
    del head.bias
    head.register_buffer("bias", bias, persistent=False)


def upcast_trainable_params(model: nn.Module) -> None:
    """Trains what is trained besides adapters (the projector) in float32: bfloat16's eight bits lose updates.

    PEFT does so for the adapters themselves.
    """
    for parameter in model.parameters():
        if parameter.requires_grad and parameter.dtype in (torch.bfloat16, torch.float16):
            parameter.data = parameter.data.float()


def sample_lengths(dataset, processor, shapes: Shapes | None = None) -> tuple[list[int], list[bool]]:
    """Roughly how many tokens each sample has, and whether it has images. Images are not read for this.

    Args:
        shapes: of the images, in visual tokens; without them all count as a square of the checkpoint's size.
    """
    sizes = processor.image_processor.image_sizing()
    per_image = sizes.tokens(sizes.size, sizes.size)
    lengths, has_image = [], []
    for batch in dataset.select_columns(["messages"]).iter(batch_size=1000):
        for messages in batch["messages"]:
            parts = [part for message in messages for part in message["content"]]
            images = sum(part["type"] == "image" for part in parts)
            visual = images * per_image
            if shapes is not None:
                visual = sum(rows * columns for rows, columns in shapes[len(lengths)])
            characters = sum(len(part["text"] or "") for part in parts if part["type"] == "text")
            lengths.append(characters // _CHARACTERS_PER_TOKEN + visual)
            has_image.append(images > 0)
    return lengths, has_image
