"""The door of lmms-eval: the entry point by which its `--model convllava` finds us."""


def manifest():
    """What lmms-eval's registry is told: the model's name and its two classes.

    lmms-eval asks chat models for generated answers alone. Tasks by log-likelihood (`output_type: multiple_choice`,
    `loglikelihood`) want a model of its older kind: `--force_simple` takes that one.
    """
    from lmms_eval.models.registry_v2 import ModelManifest

    models = "convllava_hf.evaluation.lmms_eval_models"
    return ModelManifest(
        model_id="convllava",
        chat_class_path=f"{models}.ConvLlavaChat",
        simple_class_path=f"{models}.ConvLlavaSimple",
    )
