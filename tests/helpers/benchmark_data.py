"""Made-up benchmarks in the very columns of the data sets on the Hub, as local parquet files."""

import io
from pathlib import Path

import datasets as hf

from helpers.tiny_models import make_image


PEOPLE = ["a sign", "sign", "sign", "the sign", "board", "sign", "sign", "sign", "board", "sign"]


def encoded(seed: int, height: int = 100, width: int = 60) -> dict:
    """An image as `datasets` keeps it in parquet."""
    buffer = io.BytesIO()
    make_image(height, width, seed).save(buffer, format="PNG")
    return {"bytes": buffer.getvalue(), "path": f"{seed}.png"}


def textvqa(index: int) -> dict:
    return {
        "image_id": f"{index:016x}",
        "question_id": 34602 + index,
        "question": f"what is written on sign number {index}?",
        "question_tokens": ["what", "is", "written"],
        "image": encoded(index),
        "image_width": 60,
        "image_height": 100,
        "flickr_original_url": "",
        "flickr_300k_url": "",
        "answers": PEOPLE,
        "image_classes": ["Sign"],
        "set_name": "val",
        "ocr_tokens": ["EXIT", str(index)],
    }


def docvqa(index: int) -> dict:
    return {
        "questionId": str(49153 + index),
        "question": f"What is the total of line {index}?",
        "question_types": ["form"],
        "image": encoded(index),
        "docId": 14465,
        "ucsf_document_id": "pybv0228",
        "ucsf_document_page_no": "81",
        "answers": ["$ 12.50", "12.50"],
        "data_split": "val",
    }


def infovqa(index: int) -> dict:
    return {
        "questionId": str(98313 + index),
        "question": f"How many people use platform {index}?",
        "answers": ["2.5 million"],
        "answer_type": ["single span"],
        "image": encoded(index),
        "image_url": "",
        "operation/reasoning": [],
        "ocr": "{}",
        "data_split": "val",
    }


def chartqa(index: int) -> dict:
    return {
        "type": "human_test" if index % 2 else "augmented_test",
        "question": f"What was the value in {2000 + index}?",
        "answer": str(10 + index),
        "image": encoded(index),
    }


def pope(index: int) -> dict:
    return {
        "id": str(index),
        "question_id": str(index),
        "question": f"Is there a ring of number {index} in the image?",
        "answer": "yes" if index % 2 else "no",
        "image_source": "COCO_val2014_000000310196",
        "image": encoded(index // 2),
        "category": ("adversarial", "popular", "random")[index % 3],
    }


def mme(index: int) -> dict:
    category = ("existence", "OCR", "code_reasoning")[index // 2 % 3]
    return {
        "question_id": f"{category}/{index // 2:04d}.png",
        "image": encoded(index // 2),
        "question": f"Is there a square of number {index}? Please answer yes or no.",
        "answer": "No" if index % 2 else "Yes",
        "category": category,
    }


def mmbench(index: int) -> dict:
    """Rows 0 to 3, 4 to 7, ... are one question with its options in another order each."""
    options = ["a ring", "a square", "a star", "a disc"]
    turn = index % 4
    turned = options[turn:] + options[:turn]
    return {
        "index": index // 4 + 1_000_000 * turn,
        "question": f"Which thing is in image {index // 4}?",
        "hint": "Look at the middle." if index // 4 % 2 else "nan",
        "answer": "ABCD"[turned.index("a square")],
        **dict(zip("ABCD", turned, strict=True)),
        "category": "object_localization",
        "image": encoded(index // 4),
        "source": "reasoning",
        "L2-category": "finegrained_perception (instance-level)",
        "comment": "nan",
        "split": "dev",
    }


def seed(index: int) -> dict:
    video = index % 5 == 4
    return {
        "answer": "ABCD"[index % 4],
        "choice_a": "One",
        "choice_b": "Two",
        "choice_c": "Three",
        "choice_d": "Four",
        "data_id": f"{index}",
        "data_type": "video" if video else "image",
        "question": f"How many rings are in scene {index}?",
        "question_id": str(101669 + index),
        "question_type_id": 1 + index % 3,
        "image": [encoded(index)] * (4 if video else 1),
        "segment": [0, 1] if video else None,
    }


def realworldqa(index: int) -> dict:
    only = "Please answer directly with only the letter of the correct option and nothing else."
    if index % 3 == 2:
        question, answer = (
            f"How many lanes has road {index}?\nPlease answer directly with a single word or number.",
            "3",
        )
    else:
        question, answer = f"Where is car {index}?\n\nA. Left of us.\nB. Right of us.\nC. Behind us.\n{only}", "B"
    return {"image": encoded(index), "question": question, "answer": answer, "image_path": f"{index}.webp"}


def scienceqa(index: int) -> dict:
    return {
        "image": encoded(index),
        "question": f"Which property do the objects of image {index} have in common?",
        "choices": ["soft", "yellow", "fragile"],
        "answer": index % 3,
        "hint": "Select the best answer." if index % 2 else "",
        "task": "closed choice",
        "grade": "grade4",
        "subject": "natural science" if index % 2 else "social science",
        "topic": "physics",
        "category": "Materials",
        "skill": "Compare properties of objects",
        "lecture": "",
        "solution": "",
    }


def ai2d(index: int) -> dict:
    return {
        "question": f"What does letter {index} stand for?",
        "options": ["root", "leaf", "stem", "seed"],
        "answer": str(index % 4),
        "image": encoded(index),
    }


def vqav2(index: int) -> dict:
    people = [
        {"answer": answer, "answer_confidence": "yes", "answer_id": number} for number, answer in enumerate(PEOPLE, 1)
    ]
    return {
        "question_type": "what is",
        "multiple_choice_answer": "sign",
        "answers": people,
        "image_id": 262148,
        "answer_type": "other",
        "question_id": 262148000 + index,
        "question": f"What is that thing of number {index}?",
        "image": encoded(index),
    }


def gqa(index: int) -> dict:
    return {
        "id": str(201307251 + index),
        "imageId": f"n{index % 3}",
        "question": f"Is it overcast in place {index}?",
        "isBalanced": True,
        "answer": "no",
        "fullAnswer": "No, it is clear.",
    }


def refcoco(index: int) -> dict:
    return {
        "question_id": str(469306 + index),
        "image": encoded(index, height=100, width=60),
        "question": "Please carefully observe the area circled in the image and come up with a caption for the area.",
        "answer": [f"the left ring of {index}", f"ring {index}."],
        "segmentation": [1.0, 2.0],
        "bbox": [10.0, 20.0, 30.0, 40.0],
        "iscrowd": 0,
        "file_name": f"COCO_train2014_{index}.jpg",
    }


def ocrbench(index: int) -> dict:
    kinds = ("Regular Text Recognition", "Handwritten Mathematical Expression Recognition")
    return {
        "dataset": "IIIT5K",
        "question": f"what is written in image {index}?",
        "question_type": kinds[index % 2],
        "answer": ["CENTRE"],
        "image": encoded(index),
    }


ROWS = {
    "textvqa": textvqa,
    "docvqa": docvqa,
    "infovqa": infovqa,
    "chartqa": chartqa,
    "pope": pope,
    "mme": mme,
    "mmbench": mmbench,
    "seed": seed,
    "realworldqa": realworldqa,
    "scienceqa": scienceqa,
    "ai2d": ai2d,
    "vqav2": vqav2,
    "gqa": gqa,
    "refcoco": refcoco,
    "refcoco+": refcoco,
    "refcocog": refcoco,
    "ocrbench": ocrbench,
}


def save(rows: list[dict], path: Path) -> Path:
    """Rows as a parquet file with the type of images that the Hub's have."""
    dataset = hf.Dataset.from_list(rows)
    if "image" in dataset.column_names:
        several = isinstance(next(row["image"] for row in rows if row["image"] is not None), list)
        dataset = dataset.cast_column("image", hf.List(hf.Image()) if several else hf.Image())
    path.parent.mkdir(parents=True, exist_ok=True)
    dataset.to_parquet(path)
    return path


def make(name: str, folder: Path, samples: int = 12) -> Path:
    """A local copy of a benchmark's data set as it lies on the Hub, and the path to give."""
    rows = [ROWS[name](index) for index in range(samples)]
    if name == "gqa":
        images = [{"id": f"n{index}", "image": encoded(index)} for index in range(3)]
        save(rows, folder / "testdev_balanced_instructions" / "testdev-00000-of-00001.parquet")
        save(images, folder / "testdev_balanced_images" / "testdev-00000-of-00001.parquet")
        return folder
    return save(rows, folder / f"{name}.parquet")
