"""Average normalized Levenshtein similarity: DocVQA and InfoVQA."""

from convllava_hf.evaluation import evaluate_base, metrics


class Anls(evaluate_base.Mean):
    description = __doc__

    def score(self, prediction, answers):
        return metrics.anls(prediction, answers)
