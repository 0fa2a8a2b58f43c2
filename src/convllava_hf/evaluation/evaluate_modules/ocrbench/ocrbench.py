"""OCRBench: how many predictions contain one of their answers. `categories` names each sample's kind of question."""

from convllava_hf.evaluation import evaluate_base, metrics


class Ocrbench(evaluate_base.Mean):
    description = __doc__
    columns = {**evaluate_base.Mean.columns, "categories": evaluate_base.TEXT}

    def score(self, prediction, answers, category):
        return metrics.ocrbench_score(prediction, answers, category)
