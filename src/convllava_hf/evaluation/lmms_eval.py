"""The entry point by which lmms-eval finds our model: `--model convllava`."""


def manifest():
    """The model's name and its two classes, for lmms-eval's registry.

    lmms-eval asks chat models only for generated answers. Tasks by log-likelihood (`output_type: multiple_choice`,
    `loglikelihood`) need a model of its older kind, which `--force_simple` chooses.
    """
    from lmms_eval.models.registry_v2 import ModelManifest  # pyright: ignore[reportMissingImports]

    models = "convllava_hf.evaluation.lmms_eval_models"
    return ModelManifest(
        model_id="convllava",
        chat_class_path=f"{models}.ConvLlavaChat",
        simple_class_path=f"{models}.ConvLlavaSimple",
    )
