# SPDX-License-Identifier: Apache-2.0
"""ConvLLaVA (arXiv 2405.15738): a ConvNeXt with a fifth stage, an MLP projector and a causal language model.

Read from top to bottom: outputs, vision tower, projector, `ConvLlavaModel`, `ConvLlavaForConditionalGeneration`.
"""

import contextlib
import copy
import inspect
from dataclasses import dataclass, fields

import torch
from torch import nn
from transformers import AutoModel, Cache, ConvNextPreTrainedModel, GenerationMixin, PreTrainedModel
from transformers.activations import ACT2FN
from transformers.modeling_outputs import BaseModelOutputWithPast, BaseModelOutputWithPooling, CausalLMOutputWithPast
from transformers.models.convnext.modeling_convnext import ConvNextEmbeddings, ConvNextStage
from transformers.quantizers import AutoQuantizationConfig
from transformers.utils import can_return_tuple

from .configuration_convllava import ConvLlavaConfig, set_in_package, tower_stride, visual_token_grid


# What a published config.json maps, whichever class was saved: readers of one entry must find the others (vLLM and
# SGLang take AutoModel, transformers 4 AutoModelForVision2Seq, transformers 5 the other two).
AUTO_MAP = {
    "AutoConfig": "configuration_convllava.ConvLlavaConfig",
    "AutoModel": "modeling_convllava.ConvLlavaModel",
    "AutoModelForVision2Seq": "modeling_convllava.ConvLlavaForConditionalGeneration",
    "AutoModelForImageTextToText": "modeling_convllava.ConvLlavaForConditionalGeneration",
    "AutoModelForMultimodalLM": "modeling_convllava.ConvLlavaForConditionalGeneration",
}


@dataclass
class ConvLlavaModelOutputWithPast(BaseModelOutputWithPast):
    """Output of `ConvLlavaModel`.

    `image_hidden_states`: projected visual tokens of all images in order, (visual tokens, hidden size), or `None`.
    """

    image_hidden_states: torch.FloatTensor | None = None


@dataclass
class ConvLlavaCausalLMOutputWithPast(CausalLMOutputWithPast):
    """Output of `ConvLlavaForConditionalGeneration`.

    `loss`: next-token cross entropy, where `labels` were given. `logits`: (batch, positions kept, vocabulary).
    `image_hidden_states`: projected visual tokens of all images in order, (visual tokens, hidden size), or `None`.
    """

    image_hidden_states: torch.FloatTensor | None = None


# Since 5.24, transformers calls the keys and values that a language model keeps `cache`, in calls and in outputs.
_CACHE = "cache" if "cache" in {field.name for field in fields(BaseModelOutputWithPast)} else "past_key_values"


def _named_cache(past_key_values: Cache | None, cache: Cache | None) -> dict[str, Cache | None]:
    """The cache by transformers' own name for it, by whichever name it was given."""
    return {_CACHE: past_key_values if cache is None else cache}


class ConvLlavaVisionStage(ConvNextStage):
    """A ConvNeXt stage that can keep images of different sizes in one batch apart, and be checkpointed per block."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.gradient_checkpointing = False

    def forward(self, features: torch.Tensor, mask: torch.Tensor | None = None) -> torch.Tensor:
        """
        Args:
            features: (N, C, H, W).
            mask: (N, 1, H', W') with this stage's H' and W', 1 where the image is and 0 in the padding; `None` when
                every image fills the batch. Only the depthwise convolution looks at neighbors (stem and
                downsampling take whole patches, which padding never shares with an image). It pads with zeros itself,
                so zeroing the padding of its input makes an image's features those that it gets alone.
        """
        for layer in self.downsampling_layer:
            features = layer(features)
        for layer in self.layers:
            if mask is not None:
                features = features * mask.to(features.device)  # a device map may split a stage
            if self.gradient_checkpointing and self.training:
                features = self._checkpointed(layer, features)
            else:
                features = layer(features)
        return features

    def _checkpointed(self, layer: nn.Module, features: torch.Tensor) -> torch.Tensor:
        trains = torch.is_grad_enabled() and any(parameter.requires_grad for parameter in layer.parameters())
        if not features.requires_grad:
            if not trains:
                return layer(features)
            # The reentrant kind of checkpointing silently drops a block's gradients when no input requires one.
            features.requires_grad_(True)
        return self._gradient_checkpointing_func(layer, features)


class ConvLlavaVisionEncoder(nn.Module):
    """The stages of a ConvNeXt, each halving the side of the one before."""

    def __init__(self, config):
        super().__init__()
        blocks = sum(config.depths)
        rates = [config.drop_path_rate * block / max(1, blocks - 1) for block in range(blocks)]
        self.stages = nn.ModuleList()
        in_channels = config.hidden_sizes[0]
        for index, (depth, out_channels) in enumerate(zip(config.depths, config.hidden_sizes, strict=True)):
            self.stages.append(
                ConvLlavaVisionStage(
                    config,
                    in_channels=in_channels,
                    out_channels=out_channels,
                    stride=2 if index > 0 else 1,
                    depth=depth,
                    drop_path_rates=[rates.pop(0) for _ in range(depth)],
                )
            )
            in_channels = out_channels


class ConvLlavaVisionTower(ConvNextPreTrainedModel):
    """ConvNeXt of any number of stages, without the layer norm that `ConvNextModel` keeps for pooling.

    Its weights bear the names of transformers' `ConvNextModel`.
    """

    supports_gradient_checkpointing = True
    _no_split_modules = ["ConvNextLayer"]
    # It has no attention, so whichever kind the language model is asked to use suits it.
    _supports_flash_attn = True
    _supports_sdpa = True
    _supports_flex_attn = True
    _supports_attention_backend = True

    def __init__(self, config):
        super().__init__(config)
        self.embeddings = ConvNextEmbeddings(config)
        self.encoder = ConvLlavaVisionEncoder(config)
        self.stride = tower_stride(config)
        # transformers fixes the eps of these norms at 1e-6; some of timm's ConvNeXts were trained with another.
        if (eps := getattr(config, "norm_eps", None)) is not None:
            for module in self.modules():
                if isinstance(module, nn.LayerNorm):
                    module.eps = eps
        self.post_init()

    def forward(
        self, pixel_values: torch.Tensor, image_sizes: torch.Tensor | None = None, **kwargs
    ) -> BaseModelOutputWithPooling:
        """
        Args:
            pixel_values: normalized images, padded at the right and bottom to a common size, (N, 3, H, W).
            image_sizes: height and width in pixels that each image really covers, (N, 2), multiples of the stride;
                `None` when all cover H x W.

        Returns:
            `last_hidden_state`: features (N, C, H/stride, W/stride). What lies in an image's padding is meaningless.

        Raises:
            ValueError: H, W or a size is no multiple of the stride, or a size exceeds H x W.
        """
        height, width = pixel_values.shape[-2:]
        rows, columns = visual_token_grid(height, width, self.stride)
        mask = _valid_positions(image_sizes, height, width, self.stride)  # (N, 1, rows, columns)
        features = self.embeddings(pixel_values.to(self.embeddings.patch_embeddings.weight.dtype))
        for index, stage in enumerate(self.encoder.stages):
            stage_mask = mask
            if mask is not None:
                scale = 2 ** (len(self.encoder.stages) - 1 - index)
                stage_mask = mask.repeat_interleave(scale, dim=-2).repeat_interleave(scale, dim=-1)
                stage_mask = stage_mask.to(features.device, features.dtype)
            features = stage(features, stage_mask)
        return BaseModelOutputWithPooling(last_hidden_state=features)  # (N, C, rows, columns)


def _valid_positions(image_sizes, height: int, width: int, stride: int) -> torch.Tensor | None:
    """Mask (N, 1, height/stride, width/stride) of the visual tokens that belong to an image, `None` if all do."""
    if image_sizes is None:
        return None
    sizes = _as_size_list(image_sizes)
    if all(size == (height, width) for size in sizes):
        return None
    mask = torch.zeros(len(sizes), 1, height // stride, width // stride)
    for index, size in enumerate(sizes):
        rows, columns = visual_token_grid(*size, stride)
        if size[0] > height or size[1] > width:
            raise ValueError(
                f"image_sizes names an image of {size[0]} x {size[1]} pixels, but pixel_values holds only {height} x "
                f"{width}. Pass the image_sizes that the image processor returned with these pixel_values."
            )
        mask[index, :, :rows, :columns] = 1
    return mask


def _as_size_list(image_sizes) -> list[tuple[int, int]]:
    """[(height, width), ...] from the image processor's tensor, array or lists."""
    rows = image_sizes.tolist() if hasattr(image_sizes, "tolist") else image_sizes
    return [(int(height), int(width)) for height, width in rows]


def _as_batch(images, image_sizes) -> tuple[torch.Tensor, list[tuple[int, int]]]:
    """Images (3, H, W) of several sizes as one tensor (N, 3, H, W), and the sizes that they cover of it."""
    sizes = [tuple(image.shape[-2:]) for image in images] if image_sizes is None else image_sizes
    height, width = (max(image.shape[axis] for image in images) for axis in (-2, -1))
    padded = [nn.functional.pad(image, (0, width - image.shape[-1], 0, height - image.shape[-2])) for image in images]
    return torch.stack(padded), sizes


class ConvLlavaMultiModalProjector(nn.Module):
    """Two linear layers with a GELU between them: tower channels -> language model's hidden size (section 3.2)."""

    def __init__(self, config: ConvLlavaConfig):
        super().__init__()
        hidden_size = config.text_config.hidden_size
        self.linear_1 = nn.Linear(config.vision_config.hidden_sizes[-1], hidden_size)
        self.act = ACT2FN[config.projector_hidden_act]
        self.linear_2 = nn.Linear(hidden_size, hidden_size)

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        """(visual tokens, C) -> (visual tokens, hidden size)"""
        return self.linear_2(self.act(self.linear_1(features.to(self.linear_1.weight.dtype))))


class ConvLlavaPreTrainedModel(PreTrainedModel):
    """What both models share: loading, saving, and what transformers may do with them."""

    config_class = ConvLlavaConfig
    base_model_prefix = "model"
    main_input_name = "input_ids"
    input_modalities = ("image", "text")
    supports_gradient_checkpointing = True
    _no_split_modules = ["ConvNextLayer"]  # the language model's class adds its own
    _skip_keys_device_placement = ["past_key_values", "cache"]
    _supports_flash_attn = True
    _supports_sdpa = True
    _supports_flex_attn = True
    _supports_attention_backend = True
    _can_compile_fullgraph = True
    # Quantizers match from the beginning of a name, and a checkpoint may be loaded as either model.
    _keep_unquantized = (
        "model.vision_tower",
        "model.multi_modal_projector",
        "vision_tower",
        "multi_modal_projector",
        "lm_head",
    )

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path, *model_args, quantization_config=None, **kwargs):
        """As in transformers; a `quantization_config` without a skip list quantizes the language model alone."""
        for name in ("load_in_4bit", "load_in_8bit"):  # transformers 4 still takes them by themselves
            if kwargs.pop(name, False):
                quantization_config = {"quant_method": "bitsandbytes", name: True}
        if quantization_config is not None:
            kwargs["quantization_config"] = _with_skip_list(quantization_config, cls._keep_unquantized)
        return super().from_pretrained(pretrained_model_name_or_path, *model_args, **kwargs)

    def save_pretrained(self, save_directory, *args, **kwargs):
        """As in transformers; `config.json` gets every entry of `auto_map`, not the saved class's alone."""
        self.config.auto_map = dict(AUTO_MAP)
        with _as_its_own_class(self):
            return super().save_pretrained(save_directory, *args, **kwargs)


@contextlib.contextmanager
def _as_its_own_class(model: PreTrainedModel):
    """Undoes FSDP2's swap of a model's class while the model is saved.

    `fully_shard` makes every module an instance of a class of torch's own making; transformers would ship the file in
    which that one is defined in place of ours, and nobody could load the checkpoint.
    """
    swapped = type(model)
    model.__class__ = next(
        parent
        for parent in swapped.__mro__
        if issubclass(parent, PreTrainedModel) and parent.__module__.partition(".")[0] != "torch"
    )
    try:
        yield
    finally:
        model.__class__ = swapped


def _with_skip_list(quantization_config, modules: tuple[str, ...]):
    """A copy of the config that leaves `modules` unquantized, unless it names itself what to leave."""
    if isinstance(quantization_config, dict):
        quantization_config = AutoQuantizationConfig.from_dict(dict(quantization_config))
    quantization_config = copy.deepcopy(quantization_config)
    arguments = inspect.signature(type(quantization_config).__init__).parameters
    for name in ("llm_int8_skip_modules", "modules_to_not_convert", "skip_modules"):
        if name in arguments and getattr(quantization_config, name, None) in (None, arguments[name].default):
            setattr(quantization_config, name, list(modules))
    return quantization_config


class ConvLlavaModel(ConvLlavaPreTrainedModel):
    """Vision tower, projector and language model, without the language model's head."""

    def __init__(self, config: ConvLlavaConfig):
        super().__init__(config)
        self.vision_tower = ConvLlavaVisionTower(config.vision_config)
        self.multi_modal_projector = ConvLlavaMultiModalProjector(config)
        self.language_model = AutoModel.from_config(config.text_config)
        self.post_init()

    def get_input_embeddings(self) -> nn.Module:
        return self.language_model.get_input_embeddings()

    def set_input_embeddings(self, value: nn.Module) -> None:
        self.language_model.set_input_embeddings(value)

    def get_decoder(self) -> nn.Module:
        return self.language_model

    def set_decoder(self, decoder: nn.Module) -> None:
        self.language_model = decoder

    def get_encoder(self, modality: str | None = None) -> nn.Module:
        return self.vision_tower if modality == "image" else self

    def _adjust_missing_and_unexpected_keys(self, *args, **kwargs):
        """As in transformers, which is not to report the head of a checkpoint of the whole model.

        The class must not declare it in `_keys_to_ignore_on_load_unexpected`: vLLM builds this class, adds a head, and
        leaves out the weights that are declared there, so the head would stay uninitialized.
        """
        declared = self._keys_to_ignore_on_load_unexpected
        kind = list if declared is None else type(declared)  # transformers 4 has a list or None, 5 a set
        self._keys_to_ignore_on_load_unexpected = kind([*(declared or ()), r"^lm_head\."])
        try:
            return super()._adjust_missing_and_unexpected_keys(*args, **kwargs)
        finally:
            self._keys_to_ignore_on_load_unexpected = declared

    @can_return_tuple
    def get_image_features(
        self, pixel_values: torch.Tensor, image_sizes: torch.Tensor | None = None, **kwargs
    ) -> BaseModelOutputWithPooling:
        """What the language model sees of each image.

        Args:
            pixel_values: normalized images, padded at the right and bottom to a common size, (N, 3, H, W); or a list
                of (3, H, W) that are padded here, which is how servers hand on images of several requests.
            image_sizes: height and width in pixels that each image really covers, (N, 2); `None` for all of it.

        Returns:
            `last_hidden_state`: the tower's features (N, C, H/stride, W/stride).
            `pooler_output`: a list of one tensor (visual tokens, hidden size) for each image, row by row.
        """
        if isinstance(pixel_values, (list, tuple)):
            pixel_values, image_sizes = _as_batch(pixel_values, image_sizes)
        features = self.vision_tower(pixel_values, image_sizes=image_sizes).last_hidden_state
        rows_first = features.permute(0, 2, 3, 1)  # (N, C, h, w) -> (N, h, w, C)
        if image_sizes is None:
            images = [image.flatten(0, 1) for image in rows_first]
        else:
            stride = self.vision_tower.stride
            images = [
                image[: height // stride, : width // stride].flatten(0, 1)  # (h, w, C) -> (tokens, C)
                for image, (height, width) in zip(rows_first, _as_size_list(image_sizes), strict=True)
            ]
        projected = self.multi_modal_projector(torch.cat(images))
        return BaseModelOutputWithPooling(
            last_hidden_state=features, pooler_output=list(projected.split([len(image) for image in images]))
        )

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        pixel_values: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.LongTensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: torch.FloatTensor | None = None,
        image_sizes: torch.Tensor | None = None,
        cache: Cache | None = None,
        image_hidden_states: torch.FloatTensor | None = None,
        **kwargs,
    ) -> ConvLlavaModelOutputWithPast:
        """
        Args:
            input_ids: (batch, positions), with `config.image_token_id` where a visual token goes.
            pixel_values: images of the whole batch in the order of their placeholders, (N, 3, H, W).
            attention_mask: (batch, positions), 0 for padding.
            inputs_embeds: (batch, positions, hidden size), instead of `input_ids`.
            image_sizes: height and width in pixels of each image, (N, 2).
            cache, past_key_values: the newer and the older name of the same thing.
            image_hidden_states: in place of `pixel_values`, what became of them in an earlier call, or from
                `get_image_features`: projected visual tokens of all images in order, (visual tokens, hidden size).

        Raises:
            ValueError: not exactly one of `input_ids` and `inputs_embeds`, both `pixel_values` and
                `image_hidden_states`, or a number of placeholders that differs from the number of visual tokens.
        """
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("Pass exactly one of input_ids and inputs_embeds.")
        if pixel_values is not None and image_hidden_states is not None:
            raise ValueError("Pass images as pixel_values or, encoded before, as image_hidden_states; not as both.")
        # mm_token_type_ids come from processors asked for them; the language model has no use for them.
        kwargs.pop("mm_token_type_ids", None)
        image_features, blank = image_hidden_states, None
        if pixel_values is not None:
            image_features = torch.cat(self.get_image_features(pixel_values, image_sizes).pooler_output)
        elif self.training or _is_sharded(self.vision_tower):
            blank = self._blank_image((input_ids if inputs_embeds is None else inputs_embeds).device)
        if inputs_embeds is None:
            inputs_embeds = self.get_input_embeddings()(input_ids)
        if image_features is not None:
            placeholders = self._placeholders(input_ids, inputs_embeds, len(image_features))
            image_features = image_features.to(inputs_embeds.device, inputs_embeds.dtype)
            inputs_embeds = inputs_embeds.masked_scatter(placeholders.to(inputs_embeds.device), image_features)
        if blank is not None:
            inputs_embeds = inputs_embeds + blank.to(inputs_embeds.device, inputs_embeds.dtype)
        outputs = self.language_model(
            inputs_embeds=inputs_embeds,
            attention_mask=attention_mask,
            position_ids=position_ids,
            **_named_cache(past_key_values, cache),
            **{**kwargs, "return_dict": True},
        )
        return ConvLlavaModelOutputWithPast(
            last_hidden_state=outputs.last_hidden_state,
            **{_CACHE: outputs.get(_CACHE)},
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
            image_hidden_states=image_features,
        )

    def _placeholders(self, input_ids, inputs_embeds: torch.Tensor, num_features: int) -> torch.Tensor:
        """Mask (batch, positions, 1) of the positions that visual tokens take."""
        if input_ids is not None:
            mask = input_ids == self.config.image_token_id
        else:
            token = torch.tensor(self.config.image_token_id, device=inputs_embeds.device)
            mask = (inputs_embeds == self.get_input_embeddings()(token)).all(-1)
        # Counting waits for the device; a compiled graph is not interrupted for it.
        if not torch.compiler.is_compiling() and (count := int(mask.sum())) != num_features:
            raise ValueError(
                f"The prompts hold {count} image placeholders (token {self.config.image_token_id}), but the "
                f"images have {num_features} visual tokens. Let ConvLlavaProcessor expand each <image>, and do not "
                "truncate its input_ids."
            )
        return mask.unsqueeze(-1)

    def _blank_image(self, device: torch.device) -> torch.Tensor:
        """Zero, computed from the smallest blank image through tower and projector.

        With sharded parameters (FSDP, ZeRO-3) the ranks must all run the same modules in the same order, in evaluation
        too; one whose batch has no image would leave the others waiting for ever. ZeRO-3 gathers even a weight that
        is only asked for its device, so no weight is.
        """
        side = self.vision_tower.stride
        blank = torch.zeros(1, self.config.vision_config.num_channels, side, side, device=device)
        return self.get_image_features(blank).pooler_output[0].sum() * 0.0


def _is_sharded(vision_tower: nn.Module) -> bool:
    """Whether the tower's blocks gather their weights from other processes: FSDP2 makes them DTensors until then, and
    ZeRO-3 gives them numbers."""
    weight = next(vision_tower.encoder.stages[-1].layers[-1].dwconv.parameters())
    return hasattr(weight, "ds_id") or type(weight).__name__ == "DTensor"


def _tied_weights_keys(model: PreTrainedModel):
    """transformers 5 wants to know what the head is tied to, transformers 4 takes a list of names.

    Language models call their embeddings `embed_tokens`, `wte`, `word_embeddings` and more.
    """
    if hasattr(PreTrainedModel, "get_expanded_tied_weights_keys"):
        embeddings = model.get_input_embeddings()
        name = next(name for name, module in model.named_modules() if module is embeddings)
        return {"lm_head.weight": f"{name}.weight"}
    return ["lm_head.weight"]


def _scale_logits(logits: torch.Tensor, text_config) -> torch.Tensor:
    """What some language models do to the logits of their head: Cohere, Granite and Gemma 2 in this order."""
    if (factor := getattr(text_config, "logit_scale", None)) is not None:
        logits = logits * factor
    if (divisor := getattr(text_config, "logits_scaling", None)) is not None:
        logits = logits / divisor
    if (cap := getattr(text_config, "final_logit_softcapping", None)) is not None:
        logits = torch.tanh(logits / cap) * cap
    return logits


class ConvLlavaForConditionalGeneration(ConvLlavaPreTrainedModel, GenerationMixin):
    """ConvLLaVA with the language model's head: answers questions about images."""

    def __init__(self, config: ConvLlavaConfig):
        super().__init__(config)
        self.model = ConvLlavaModel(config)
        self.lm_head = nn.Linear(config.text_config.hidden_size, config.text_config.vocab_size, bias=False)
        self._tied_weights_keys = _tied_weights_keys(self)
        self.post_init()

    @property
    def vision_tower(self) -> nn.Module:
        return self.model.vision_tower

    @property
    def multi_modal_projector(self) -> nn.Module:
        return self.model.multi_modal_projector

    @property
    def language_model(self) -> nn.Module:
        return self.model.language_model

    def get_input_embeddings(self) -> nn.Module:
        return self.model.get_input_embeddings()

    def set_input_embeddings(self, value: nn.Module) -> None:
        self.model.set_input_embeddings(value)

    def get_output_embeddings(self) -> nn.Module:
        return self.lm_head

    def set_output_embeddings(self, value: nn.Module) -> None:
        self.lm_head = value

    def get_decoder(self) -> nn.Module:
        return self.model.get_decoder()

    def set_decoder(self, decoder: nn.Module) -> None:
        self.model.set_decoder(decoder)

    def get_encoder(self, modality: str | None = None) -> nn.Module:
        return self.model.get_encoder(modality)

    def get_image_features(self, pixel_values: torch.Tensor, image_sizes: torch.Tensor | None = None, **kwargs):
        """See `ConvLlavaModel.get_image_features`."""
        return self.model.get_image_features(pixel_values, image_sizes, **kwargs)

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        pixel_values: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.LongTensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: torch.FloatTensor | None = None,
        labels: torch.LongTensor | None = None,
        image_sizes: torch.Tensor | None = None,
        logits_to_keep: int | torch.Tensor = 0,
        cache: Cache | None = None,
        image_hidden_states: torch.FloatTensor | None = None,
        **kwargs,
    ) -> ConvLlavaCausalLMOutputWithPast:
        """`ConvLlavaModel.forward` and the language model's head.

        Args:
            labels: (batch, positions), -100 where no loss is taken; position t is predicted from those before it.
            logits_to_keep: compute logits for the last so many positions only (0: all), or for these positions.
        """
        outputs = self.model(
            input_ids=input_ids,
            pixel_values=pixel_values,
            attention_mask=attention_mask,
            position_ids=position_ids,
            **_named_cache(past_key_values, cache),
            inputs_embeds=inputs_embeds,
            image_sizes=image_sizes,
            image_hidden_states=image_hidden_states,
            **{**kwargs, "return_dict": True},
        )
        keep = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        logits = _scale_logits(self.lm_head(outputs.last_hidden_state[:, keep]), self.config.text_config)
        loss = None
        if labels is not None:
            loss = self.loss_function(
                logits=logits, labels=labels, vocab_size=self.config.text_config.vocab_size, **kwargs
            )
        return ConvLlavaCausalLMOutputWithPast(
            loss=loss,
            logits=logits,
            **{_CACHE: outputs.get(_CACHE)},
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
            image_hidden_states=outputs.image_hidden_states,
        )

    def prepare_inputs_for_generation(self, input_ids, attention_mask=None, inputs_embeds=None, **kwargs):
        """As in transformers; images go in with the ids that have a place for them.

        The cache holds what earlier ones were, so a further turn on it may bring images of its own.
        """
        inputs = super().prepare_inputs_for_generation(
            input_ids, attention_mask=attention_mask, inputs_embeds=inputs_embeds, **kwargs
        )
        ids = inputs.get("input_ids")
        if inputs.get("pixel_values") is None and inputs.get("image_hidden_states") is None:
            return inputs
        if kwargs.get("is_first_iteration") is False and kwargs.get("use_cache", True):
            # transformers 5 says so; a look at the ids would wait for the device in every step.
            inputs.update(pixel_values=None, image_sizes=None, image_hidden_states=None)
        elif ids is not None:
            places = int((ids == self.config.image_token_id).sum())
            # transformers 4 hands images on in every step, also to guessed tokens that repeat a placeholder.
            goes_on = (cache_position := kwargs.get("cache_position")) is not None and cache_position[0] != 0
            if not places or (goes_on and places != self._given_visual_tokens(inputs)):
                inputs.update(pixel_values=None, image_sizes=None, image_hidden_states=None)
        return inputs

    def _given_visual_tokens(self, inputs: dict) -> int:
        """How many visual tokens the images among the inputs have, encoded before or not."""
        if (encoded := inputs.get("image_hidden_states")) is not None:
            return len(encoded)
        return sum(self._visual_tokens(inputs["pixel_values"], inputs.get("image_sizes")))

    def _visual_tokens(self, pixel_values: torch.Tensor, image_sizes) -> list[int]:
        """How many visual tokens each image has."""
        if image_sizes is None:
            image_sizes = [tuple(pixel_values.shape[-2:])] * len(pixel_values)
        return [self.config.num_visual_tokens(*size) for size in _as_size_list(image_sizes)]

    def _expand_inputs_for_generation(self, expand_size=1, is_encoder_decoder=False, input_ids=None, **model_kwargs):
        """Repeats each prompt for beams and `num_return_sequences`, and each prompt's images together with it.

        `pixel_values` has a row for each image, not for each prompt, so repeating its rows one by one would hand
        prompts with several images, or with none, those of their neighbors.
        """
        names = ("pixel_values", "image_sizes", "image_hidden_states")
        images = {key: model_kwargs.pop(key, None) for key in names}
        if expand_size > 1 and (images["pixel_values"] is not None or images["image_hidden_states"] is not None):
            counts = self._rows_per_prompt(input_ids, images, model_kwargs.get("inputs_embeds"))
            for key, rows in images.items():
                if rows is not None:
                    groups = torch.as_tensor(rows).split(counts)
                    images[key] = torch.cat([group for group in groups for _ in range(expand_size)])
        input_ids, model_kwargs = super()._expand_inputs_for_generation(
            expand_size=expand_size, is_encoder_decoder=is_encoder_decoder, input_ids=input_ids, **model_kwargs
        )
        model_kwargs.update({key: rows for key, rows in images.items() if rows is not None})
        return input_ids, model_kwargs

    def _rows_per_prompt(self, input_ids, images: dict, inputs_embeds) -> list[int]:
        """How many rows of the images' tensors, in order, belong to each prompt, by the visual tokens that it has
        room for: one an image in `pixel_values`, one a visual token in `image_hidden_states`."""
        by_ids = inputs_embeds is None or inputs_embeds.shape[1] == 0
        placeholders = self.model._placeholders(
            input_ids if by_ids else None, inputs_embeds, self._given_visual_tokens(images)
        )
        rooms = placeholders.sum(dim=(1, 2)).tolist()
        if images["pixel_values"] is None:
            return rooms
        tokens = self._visual_tokens(images["pixel_values"], images["image_sizes"])
        counts = []
        for room in rooms:
            counts.append(0)
            while room > 0:
                room -= tokens.pop(0)
                counts[-1] += 1
        return counts


set_in_package(__name__)
