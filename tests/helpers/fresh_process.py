"""Runs code in a fresh process, away from the checkout, where convllava_hf cannot be imported unless it is wanted."""

import json
import os
import sys
import tempfile
import textwrap
from pathlib import Path

from helpers import fork_server


_PRELUDE = """
import json, sys
from pathlib import Path

class _Absent:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] == "convllava_hf":
            raise ModuleNotFoundError("convllava_hf is not installed here", name=name)

if not {package}:
    sys.meta_path.insert(0, _Absent())

import transformers
transformers.utils.logging.disable_progress_bar()
values = json.loads(Path({values!r}).read_text())
result = None
"""

# Defines `answers(folder, names)`: what each of these Auto classes answers to one image, and with what code.
ANSWERS = '''
from PIL import Image

def answers(folder, names, **kwargs):
    """Greedy answers of a checkpoint loaded through each of the named Auto classes, and where the code is from."""
    processor = transformers.AutoProcessor.from_pretrained(folder, **kwargs)
    image = Image.open(values["image"])
    content = [{"type": "image", "image": image}, {"type": "text", "text": values["question"]}]
    inputs = processor.apply_chat_template(
        [{"role": "user", "content": content}],
        add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt",
    )
    told = {"input_ids": inputs["input_ids"].tolist(), "processor": type(processor).__module__}
    told["image_processor"] = type(processor.image_processor).__module__
    for name in names:
        model = getattr(transformers, name).from_pretrained(folder, **kwargs)
        told[name] = {"class": type(model).__name__, "module": type(model).__module__}
        if model.can_generate():
            ids = model.generate(**inputs, max_new_tokens=16, do_sample=False)
            told[name]["ids"] = ids[0, inputs["input_ids"].shape[1]:].tolist()
        else:
            told[name]["ids"] = model(**inputs).last_hidden_state[0].abs().sum(-1).tolist()
    return told
'''


def run_fresh(
    script: str, *, package: bool = False, python: str = sys.executable, timeout: float = 300, env=None, **values
):
    """What `script` leaves in `result`, through JSON.

    Args:
        script: sees `transformers`, and `values`, a dict of what is passed here by name.
        package: whether convllava_hf can be imported.
        python: another environment's interpreter.
        env: environment variables to set, or to remove (`None`).

    Raises:
        AssertionError: the process failed; the message ends with what it wrote to stderr.
    """
    with tempfile.TemporaryDirectory(prefix="fresh-") as folder:
        home = Path(folder)
        passed = home / "values.json"
        passed.write_text(json.dumps(values, default=str))
        output = home / "result.json"
        program = "\n".join(
            [
                _PRELUDE.format(package=package, values=str(passed)),
                textwrap.dedent(script),
                f"Path({str(output)!r}).write_text(json.dumps(result))",
            ]
        )
        process = fork_server.run(
            [python, "-c", program], cwd=home, env=fresh_environment(home, **(env or {})), timeout=timeout
        )
        assert process.returncode == 0, f"The fresh process failed:\n{process.stderr[-6000:]}"
        return json.loads(output.read_text())


def fresh_environment(home: Path, **changes: str | None) -> dict[str, str]:
    """This process's environment with caches of its own in `home`; a change to `None` removes the variable."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("HF_", "PYTHON"))}
    environment |= {
        "HF_HOME": str(home / "huggingface"),
        "HF_MODULES_CACHE": str(home / "modules"),
        "HF_HUB_OFFLINE": "1",
        "TOKENIZERS_PARALLELISM": "false",
    }
    for name, value in changes.items():
        environment.pop(name, None)
        if value is not None:
            environment[name] = value
    return environment
