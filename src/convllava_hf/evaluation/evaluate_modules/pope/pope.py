"""POPE: accuracy, precision, recall, F1 and share of yes. `references` are yes or no; predictions are read for it."""

from convllava_hf.evaluation import evaluate_base, metrics


class Pope(evaluate_base.Module):
    description = __doc__
    columns = {"predictions": evaluate_base.TEXT, "references": evaluate_base.TEXT}

    def _compute(self, predictions, references):
        said = [metrics.parse_yes_no(prediction) for prediction in predictions]
        return metrics.pope_scores(said, evaluate_base.yes_or_no(references))
