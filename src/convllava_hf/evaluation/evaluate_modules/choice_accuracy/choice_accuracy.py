"""Accuracy of answers by letter or by text. `references` are numbers of options from 0, `choices` the options."""

from convllava_hf.evaluation import evaluate_base, metrics


class ChoiceAccuracy(evaluate_base.Mean):
    description = __doc__
    columns = {
        "predictions": evaluate_base.TEXT,
        "references": evaluate_base.NUMBER,
        "choices": evaluate_base.TEXTS,
    }

    def score(self, prediction, reference, choices):
        return float(metrics.parse_choice(prediction, choices) == reference)
