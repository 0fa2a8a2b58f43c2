"""What later turns of a chat gain from earlier ones: with `Assistant.with_prompt_cache()` and without, in turns.

    python benchmarks/speed_chat.py

Three questions about one image at 768 and 1536 pixels, to the paper's tower and a language model of the shape of
Qwen2.5's 0.5B, random weights. Answers are the same; the time to the first token is what differs. Writes
benchmarks/results/speed/chat.md and .json.
"""

import statistics
import sys
import tempfile
from pathlib import Path

from speed_contest import note, options, publish

from convllava_hf.profiling.tables import seconds, table


GOLDEN = Path(__file__).parents[1] / "tests" / "golden"
QUESTIONS = ("What is on the sign?", "And what stands below it?", "Which color has it?")


def main() -> int:
    parser = options(__doc__, rounds=2)
    parser.add_argument("--text", default="0.5b", help="size of the language model (%(default)s)")
    arguments = parser.parse_args()
    assistant = make_assistant(arguments)
    rows = []
    for side in (128,) if arguments.tiny else (768, 1536):
        runs = [converse(assistant, side) for _ in range(arguments.rounds)]
        note(f"{side} pixels done")
        for turn in range(len(QUESTIONS)):
            without, with_memory = (statistics.median(run[kind][turn][0] for run in runs) for kind in (0, 1))
            reused, prompt = runs[0][1][turn][1:]
            row = {"side": side, "turn": turn + 1, "prompt": prompt, "reused": reused}
            rows.append({**row, "without": without, "with": with_memory})
    columns = [
        ("resolution", lambda row: str(row["side"])),
        ("turn", lambda row: str(row["turn"])),
        ("prompt tokens", lambda row: str(row["prompt"])),
        ("of them reused", lambda row: str(row["reused"])),
        ("first token without memory", lambda row: seconds(row["without"])),
        ("with", lambda row: seconds(row["with"])),
        ("times faster", lambda row: f"{row['without'] / row['with']:.1f}"),
    ]
    publish("chat", "Later turns of a chat", rows, [table(rows, columns)], arguments)
    return 0


def make_assistant(arguments):
    """A model of random weights with the golden checkpoint's tokenizer."""
    from convllava_hf import ConvLlavaProcessor
    from convllava_hf.convert import convert_checkpoint
    from convllava_hf.inference import Assistant
    from convllava_hf.inference.loading import choose_device, choose_dtype
    from convllava_hf.inference.vision_backends import choose_vision_backend, optimize_vision_tower
    from convllava_hf.profiling.models import random_model

    device = choose_device(arguments.device)
    dtype = choose_dtype(device, arguments.dtype)
    with tempfile.TemporaryDirectory(prefix="speed-chat-") as folder:
        convert_checkpoint(GOLDEN / "checkpoint-init", Path(folder) / "golden", progress=False)
        processor = ConvLlavaProcessor.from_pretrained(Path(folder) / "golden")
    model = random_model("tiny" if arguments.tiny else arguments.text, device, dtype)
    model.config.image_token_id = model.model.config.image_token_id = processor.image_token_id
    optimize_vision_tower(model.vision_tower, choose_vision_backend(device, dtype))
    return Assistant(model, processor)


def converse(assistant, side: int) -> list[list[tuple[float, int, int]]]:
    """Without memory and with it, for each turn: seconds to the first token, tokens reused, tokens of the prompt."""
    from convllava_hf.inference import assistant_turn, user_turn
    from convllava_hf.profiling.preprocessing import jpeg, open_jpeg

    image = open_jpeg(jpeg(1024, 768))
    assistant = assistant.with_image_options(size=side)
    kinds = [assistant, assistant.with_prompt_cache()]
    found = [[], []]
    messages = []
    for number, question in enumerate(QUESTIONS):
        messages.append(user_turn(question, [image] if number == 0 else []))
        for kind, one in enumerate(kinds):
            answer = one.answer(messages, max_new_tokens=2)
            found[kind].append((answer.first_token_seconds, answer.reused_tokens, answer.prompt_tokens))
        messages.append(assistant_turn("A short answer, the same in each run."))
    return found


if __name__ == "__main__":
    sys.exit(main())
