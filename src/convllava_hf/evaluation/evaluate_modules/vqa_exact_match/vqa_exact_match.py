"""Exact match after the normalization of VQA v2: GQA."""

from convllava_hf.evaluation import evaluate_base, metrics


class VqaExactMatch(evaluate_base.Mean):
    description = __doc__

    def score(self, prediction, answers):
        return metrics.exact_match(prediction, answers)
