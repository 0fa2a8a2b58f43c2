"""Accuracy of boxes at an IoU of 0.5: RefCOCO, RefCOCO+, RefCOCOg.

`references` are left, top, right and bottom in pixels, `widths` and `heights` those of the images. Predictions are
texts; the first box in one counts, in fractions or thousandths of the square that the image was padded to, or of the
image itself with `padded=False`.
"""

from convllava_hf.evaluation import evaluate_base, metrics


class BoxAccuracy(evaluate_base.Module):
    description = __doc__
    columns = {
        "predictions": evaluate_base.TEXT,
        "references": evaluate_base.NUMBERS,
        "widths": evaluate_base.NUMBER,
        "heights": evaluate_base.NUMBER,
    }

    def _compute(self, predictions, references, widths, heights, padded=True):
        found = 0
        for prediction, truth, width, height in zip(predictions, references, widths, heights, strict=True):
            box = metrics.box_in_answer(prediction, width, height, padded)
            left, top, right, bottom = truth
            unit = (left / width, top / height, right / width, bottom / height)
            found += box is not None and metrics.box_iou(box, unit) >= metrics.MIN_IOU
        return {self.name: found / len(predictions)}
