"""MME: each category's score and the sums perception and cognition.

`references` are yes or no, `categories` and `image_ids` say which two questions belong together.
"""

from convllava_hf.evaluation import evaluate_base, metrics


class Mme(evaluate_base.Module):
    description = __doc__
    columns = {
        "predictions": evaluate_base.TEXT,
        "references": evaluate_base.TEXT,
        "categories": evaluate_base.TEXT,
        "image_ids": evaluate_base.TEXT,
    }

    def _compute(self, predictions, references, categories, image_ids):
        said = [metrics.parse_yes_no(prediction) for prediction in predictions]
        answers = evaluate_base.yes_or_no(references)
        rows = zip(categories, image_ids, said, answers, strict=True)
        return metrics.mme_scores(metrics.MmeRow(*row) for row in rows)
