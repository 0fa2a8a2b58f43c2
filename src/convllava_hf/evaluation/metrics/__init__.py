"""The benchmarks' metrics as pure functions over texts and numbers.

A score lies between 0 and 1 unless its function says otherwise. Prediction and answers are given as they are: every
function does the normalization that its definition asks for. Importing this loads neither torch nor another large
library; `anls` needs rapidfuzz.
"""

from .box_metrics import MIN_IOU, Box, box_in_answer, box_iou, parse_boxes, to_unit_box, undo_square_padding
from .choices import parse_choice, parse_yes_no
from .documents import anls, ocrbench_score, relaxed_accuracy
from .vqa import exact_match, normalize_vqa, textvqa_accuracy, vqa_accuracy
from .yes_no import MME_COGNITION, MME_PERCEPTION, MmeRow, f1_score, mme_points, mme_scores, pope_scores


__all__ = [
    "MIN_IOU",
    "MME_COGNITION",
    "MME_PERCEPTION",
    "Box",
    "MmeRow",
    "anls",
    "box_in_answer",
    "box_iou",
    "exact_match",
    "f1_score",
    "mme_points",
    "mme_scores",
    "normalize_vqa",
    "ocrbench_score",
    "parse_boxes",
    "parse_choice",
    "parse_yes_no",
    "pope_scores",
    "relaxed_accuracy",
    "textvqa_accuracy",
    "to_unit_box",
    "undo_square_padding",
    "vqa_accuracy",
]
