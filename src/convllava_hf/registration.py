"""Registers ConvLLaVA with transformers' Auto classes, and holds what the package exports."""

import inspect
from typing import Any

import transformers
from transformers import AutoConfig, AutoModel, AutoModelForImageTextToText, AutoProcessor

# transformers 5.16 without torchvision offers only a dummy at the top level.
from transformers.models.auto.image_processing_auto import AutoImageProcessor

from .modeling.configuration_convllava import ConvLlavaConfig
from .modeling.image_processing_convllava import ConvLlavaImageProcessor
from .modeling.modeling_convllava import ConvLlavaForConditionalGeneration, ConvLlavaModel
from .modeling.processing_convllava import ConvLlavaProcessor


# transformers 5 dropped the name; its successor does the same.
AutoModelForVision2Seq = getattr(transformers, "AutoModelForVision2Seq", AutoModelForImageTextToText)


def _register_image_processor() -> None:
    """One class, PIL-backed, whichever backend transformers 5 would rather have; transformers 4 calls it slow."""
    if "image_processor_classes" in inspect.signature(AutoImageProcessor.register).parameters:
        classes: dict[str, Any] = {
            "image_processor_classes": dict.fromkeys(("pil", "torchvision"), ConvLlavaImageProcessor)
        }
    else:
        classes = {"slow_image_processor_class": ConvLlavaImageProcessor}
    AutoImageProcessor.register(ConvLlavaConfig, **classes, exist_ok=True)


def _register() -> None:
    AutoConfig.register(ConvLlavaConfig.model_type, ConvLlavaConfig, exist_ok=True)
    AutoModel.register(ConvLlavaConfig, ConvLlavaModel, exist_ok=True)
    for name in ("AutoModelForVision2Seq", "AutoModelForImageTextToText", "AutoModelForMultimodalLM"):
        if (auto_class := getattr(transformers, name, None)) is not None:
            auto_class.register(ConvLlavaConfig, ConvLlavaForConditionalGeneration, exist_ok=True)
    _register_image_processor()
    AutoProcessor.register(ConvLlavaConfig, ConvLlavaProcessor, exist_ok=True)
    # Checkpoints saved from here carry the code that loads them.
    ConvLlavaConfig.register_for_auto_class()
    ConvLlavaModel.register_for_auto_class("AutoModel")
    ConvLlavaForConditionalGeneration.register_for_auto_class("AutoModelForImageTextToText")
    ConvLlavaImageProcessor.register_for_auto_class("AutoImageProcessor")
    ConvLlavaProcessor.register_for_auto_class("AutoProcessor")


_register()
