"""Accuracy with a tolerance of 5 % for numbers: ChartQA."""

from convllava_hf.evaluation import evaluate_base, metrics


class RelaxedAccuracy(evaluate_base.Mean):
    description = __doc__

    def score(self, prediction, answers):
        return metrics.relaxed_accuracy(prediction, answers)
