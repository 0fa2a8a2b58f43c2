"""VQA accuracy as TextVQA's own evaluator counts it, each prediction with the answers of ten people."""

from convllava_hf.evaluation import evaluate_base, metrics


class TextvqaAccuracy(evaluate_base.Mean):
    description = __doc__

    def score(self, prediction, answers):
        return metrics.textvqa_accuracy(prediction, answers)
