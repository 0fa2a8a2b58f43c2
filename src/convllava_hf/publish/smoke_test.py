"""Uses a published folder as somebody else would: `python smoke_test.py REQUEST`, in a process of its own.

Nothing of convllava_hf can be imported here, whether or not it is installed. REQUEST is JSON: `folder`, whose code is
this package's or was trusted, `base_model` (an adapter's, or null), `base_code` (the folder of the code that the base
model is loaded by, or null for that of its own repository), `shown` (a list of `question` and `image`) and `result`,
the file that the answers go to.
"""

import json
import sys
import warnings
from pathlib import Path


class _Absent:
    """The first finder that Python asks: our package is not there."""

    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] == "convllava_hf":
            raise ModuleNotFoundError("convllava_hf is not installed for somebody else", name=name)


def main(request_file: str) -> None:
    request = json.loads(Path(request_file).read_text(encoding="utf-8"))
    folder = request["folder"]
    from transformers import AutoProcessor

    processor = AutoProcessor.from_pretrained(folder, trust_remote_code=True)
    model = _load(folder, request["base_model"], request["base_code"])
    answers = [_answer(model, processor, one["question"], one["image"]) for one in request["shown"]]
    Path(request["result"]).write_text(json.dumps(answers), encoding="utf-8")


def _load(folder: str, base_model: str | None, base_code: str | None):
    """The model, on a GPU where there is one, with nothing missing from its weights and nothing left over."""
    import torch
    from transformers import AutoModelForImageTextToText
    from transformers.dynamic_module_utils import get_class_from_dynamic_module

    if base_model and base_code:  # the base model's repository is somebody else's, and so is the code in it
        name = "modeling_convllava.ConvLlavaForConditionalGeneration"
        loader, trust = get_class_from_dynamic_module(name, base_code), False
    else:
        loader, trust = AutoModelForImageTextToText, True
    model, info = loader.from_pretrained(
        base_model or folder,
        dtype="auto",
        device_map={"": "cuda" if torch.cuda.is_available() else "cpu"},
        trust_remote_code=trust,
        output_loading_info=True,
    )
    for kind in ("missing_keys", "unexpected_keys", "mismatched_keys", "error_msgs"):
        if found := sorted(map(str, info.get(kind) or ())):
            raise SystemExit(f"the weights have {len(found)} {kind}: {found[0]}")
    if base_model:
        from peft import PeftModel

        warnings.filterwarnings("error", message=".*missing adapter keys")  # it would go on with random weights
        model = PeftModel.from_pretrained(model, folder)
    return model.eval()


def _answer(model, processor, question: str, image_path: str | None) -> str:
    import torch
    from PIL import Image

    image = Image.open(image_path) if image_path else Image.linear_gradient("L").convert("RGB")
    content = [{"type": "image", "image": image}, {"type": "text", "text": question}]
    inputs = processor.apply_chat_template(
        [{"role": "user", "content": content}],
        add_generation_prompt=True,
        tokenize=True,
        return_dict=True,
        return_tensors="pt",
    ).to(model.device, model.dtype)
    with torch.inference_mode():
        output = model.generate(**inputs, max_new_tokens=64, do_sample=False)
    new = output[0, inputs["input_ids"].shape[1] :]
    if not len(new):
        raise SystemExit("the model generated no token")
    return processor.decode(new, skip_special_tokens=True).strip()


if __name__ == "__main__":
    # Python puts this file's folder first on sys.path, where a module of this package would hide one of that name.
    sys.path = [entry for entry in sys.path if Path(entry or ".").resolve() != Path(__file__).resolve().parent]
    sys.meta_path.insert(0, _Absent())
    main(sys.argv[1])
