"""VQA accuracy of predictions, each with the answers of ten people."""

from convllava_hf.evaluation import evaluate_base, metrics


class VqaAccuracy(evaluate_base.Mean):
    description = __doc__

    def score(self, prediction, answers):
        return metrics.vqa_accuracy(prediction, answers)
