"""Arguments of a recipe beyond TRL's own."""

from dataclasses import dataclass, field

from trl import ModelConfig, ScriptArguments, SFTConfig

from ..boxes import check_frame
from ..data.bad_samples import BadSamples
from ..errors import ConvLlavaError
from ..options import ImageOptions
from .recipe import RecipeParser
from .recipe_checks import check_output, check_packages, check_values


# LoRA on the language model's linear layers: `all-linear` would also take ConvNeXt's and the projector's.
LORA_TARGETS = r".*language_model.*\.(q_proj|k_proj|v_proj|o_proj|gate_proj|up_proj|down_proj)"


@dataclass
class DataArguments(ImageOptions, ScriptArguments):
    """Where the samples come from, and how large the model sees their images.

    `dataset_name` may also be a LLaVA JSON or JSONL file or a folder of parquet.
    """

    image_folder: str | None = field(
        default=None, metadata={"help": "Folder that image paths in a LLaVA file are relative to."}
    )
    datasets: list[dict] | None = field(
        default=None,
        metadata={
            "help": "A mixture instead of dataset_name: in the recipe, a list of `path`, and where needed "
            "`image_folder`, `name`, `split`, `boxes` and `weight`. A dataset_name given on the command line replaces "
            "it."
        },
    )
    boxes: str = field(
        default="square",
        metadata={
            "help": "What the boxes in the data are fractions (or thousandths) of: `square`, the padded square, as in "
            "LLaVA's files, or `image`. They are rewritten where the model sees images in the other frame. An entry "
            "of datasets may set its own; eval_dataset_name uses the same."
        },
    )
    eval_dataset_name: str | None = field(
        default=None,
        metadata={
            "help": "With eval_strategy: the data set to measure the loss on; if not given, dataset_test_split of "
            "dataset_name."
        },
    )
    on_bad_image: str = field(
        default="error",
        metadata={
            "help": "What to do with an image that cannot be used (unreadable, or with more visual tokens than "
            "max_length): `error`, or `skip` to use another sample instead."
        },
    )
    max_bad_images: int = field(
        default=100,
        metadata={"help": "With on_bad_image=skip: how many samples a process may skip; one more is an error."},
    )
    on_bad_sample: str = field(
        default="error",
        metadata={
            "help": "What to do with a sample that cannot be used (an empty answer, no image for its <image>, a "
            "video, broken text): `error`, or `skip` to leave it out."
        },
    )
    max_bad_samples: int = field(
        default=100,
        metadata={"help": "With on_bad_sample=skip: how many samples may be left out in total; one more is an error."},
    )
    resolution: int | None = field(
        default=None,
        metadata={
            "help": "Side in pixels of the squares that the model sees. It replaces {resolution} in the recipe's "
            "texts, such as paths; a checkpoint with squares of another size is refused."
        },
    )

    def __post_init__(self):
        check_frame(self.boxes)
        if self.on_bad_image not in ("error", "skip"):
            raise ConvLlavaError(f"on_bad_image is {self.on_bad_image!r}; expected error or skip.")
        self.bad_samples = self.new_bad_samples()
        if not self.dataset_name and not self.datasets:
            raise ConvLlavaError("No data: set dataset_name, or datasets for a mixture.")
        if self.dataset_name:
            self.datasets = None

    def new_bad_samples(self) -> BadSamples:
        """The policy for samples that cannot be used, which counts what it leaves out; `bad_samples` is the training
        data's."""
        return BadSamples(self.on_bad_sample, self.max_bad_samples)


@dataclass
class TrainingArguments(SFTConfig):
    """TRL's `SFTConfig` and what trains, at which rate, in which order."""

    trainable: list[str] | None = field(
        default=None,
        metadata={
            "help": "What trains: globs over module names, with the short names projector, vision_tower, "
            "vision_tower.stages.N, language_model and lm_head. Required unless use_peft is set."
        },
    )
    projector_learning_rate: float | None = field(
        default=None, metadata={"help": "Learning rate of the projector; learning_rate if not given."}
    )
    vision_tower_learning_rate: float | None = field(
        default=None, metadata={"help": "Learning rate of the vision tower; learning_rate if not given."}
    )
    group_by_modality_length: bool = field(
        default=True,
        metadata={
            "help": "Whether to group samples so that a step's batches all have images or none, and similar lengths."
        },
    )
    group_by_image_shape: bool = field(
        default=False,
        metadata={
            "help": "Whether to group native images of similar shapes as well, to save padding. This reads the "
            "header of every image once."
        },
    )
    merge_adapter: bool = field(
        default=False, metadata={"help": "With use_peft: also save the model with the adapter merged, in merged/."}
    )

    def __post_init__(self):
        if isinstance(self.trainable, str):  # `trainable: projector` in a recipe
            self.trainable = [self.trainable]
        if self.ddp_find_unused_parameters is None:
            # The model runs its tower on every training batch, so that no rank is left waiting.
            self.ddp_find_unused_parameters = False
        super().__post_init__()


def make_parser(**kwargs) -> RecipeParser:
    """The parser of recipes and of the command line over them."""
    kwargs.setdefault("allow_abbrev", False)  # a key that is misspelled is not taken for another
    kwargs.setdefault("usage", "%(prog)s --config RECIPE [--accelerate_config NAME] [--key value ...]")
    kwargs.setdefault(
        "description",
        "RECIPE is a YAML file of the keys below. Keys given here override it. With --accelerate_config, training "
        "runs in one process per device: NAME is multi_gpu, fsdp2, zero2, zero3 or another of TRL's configs, or a "
        "file that `accelerate config` wrote; options of `accelerate launch`, such as --num_processes, can then be "
        "given too.",
    )
    return RecipeParser((DataArguments, TrainingArguments, ModelConfig), **kwargs)


def check_arguments(data: DataArguments, training: TrainingArguments, model: ModelConfig) -> None:
    """Refuses what cannot work, before anything is loaded.

    Raises:
        ConvLlavaError: see the messages.
    """
    if not model.model_name_or_path:
        raise ConvLlavaError("model_name_or_path is missing: name the checkpoint to start from.")
    if model.use_peft and training.trainable:
        raise ConvLlavaError(
            "Both use_peft and trainable are set. LoRA decides by lora_target_modules and lora_modules_to_save what "
            "trains; leave one of them out."
        )
    if not model.use_peft and not training.trainable:
        raise ConvLlavaError(
            "The recipe does not say what trains: set trainable, such as [projector, language_model], or use_peft."
        )
    if not model.use_peft and (training.fp16 or model.dtype == "float16"):
        raise ConvLlavaError(
            "fp16 is too narrow for full training: set bf16, or neither for float32, and dtype to float32 or bfloat16."
        )
    if training.merge_adapter and (not model.use_peft or model.load_in_4bit or model.load_in_8bit):
        raise ConvLlavaError(
            "merge_adapter needs use_peft and a model that is not quantized. Merge a QLoRA adapter afterwards into "
            "the model in full precision, with peft's merge_and_unload."
        )
    has_splits = data.dataset_name and not data.dataset_name.endswith((".json", ".jsonl"))
    if training.eval_strategy != "no" and not data.eval_dataset_name and not has_splits:
        raise ConvLlavaError(
            f"eval_strategy is {str(training.eval_strategy)!r}, but the data has no split to evaluate on: name "
            "eval_dataset_name, or leave eval_strategy out."
        )
    if training.group_by_image_shape and (data.dataset_streaming or not training.group_by_modality_length):
        raise ConvLlavaError(
            "group_by_image_shape needs group_by_modality_length and a data set that does not stream: its images' "
            "sizes must be known before the first step."
        )
    if training.packing or training.padding_free:
        raise ConvLlavaError("packing and padding_free do not work with images: leave them out.")
    if training.chat_template_path and not training.chat_template_path.endswith((".jinja", ".j2")):
        raise ConvLlavaError(
            f"chat_template_path is {training.chat_template_path!r}; expected a .jinja file. Another "
            "tokenizer would bring other special tokens, and perhaps code."
        )
    check_values(data, training, model)
    check_packages(training, model)
    check_output(training.output_dir)
