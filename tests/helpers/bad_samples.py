"""Samples that nobody can train on, of every kind, as they stand in files: JSON texts, for some of them no Python
object can stand for."""

import json


def conversation(question: str = "<image>\nWhat?", answer: str = "It.", **more) -> dict:
    return {"conversations": [{"from": "human", "value": question}, {"from": "gpt", "value": answer}], **more}


def nested(depth: int) -> str:
    return "[" * depth + "]" * depth


_HALF = "\ud83d"
_OF_KINDS = {
    "empty answer": [conversation(answer="", image="good.png"), conversation("What?", " \n ")],
    "placeholder mismatch": [
        conversation("What?", image="good.png"),  # LLaVA-VL/LLaVA-NeXT#459
        conversation("What is <image> in RSS?", "A logo."),
        conversation("What is it in RSS?", "<image> holds a logo."),
        conversation(image="good.png", answer="See <image>."),
        conversation("<image>\n<image>\nWhich?", image="good.png"),
    ],
    "video sample": [
        conversation("<video>\nWhat happens?", video="run.mp4"),
        conversation("What happens in the clip?", video="run.mp4"),
        conversation("<video>\nWhat happens?"),
        conversation("What happens?\n<video>"),
        conversation("<audio>\nWho speaks?", audio="talk.wav"),
        conversation(image="good.png", videos=["run.mp4"]),
    ],
    "broken text": [
        conversation("What?", f"Nice {_HALF} end"),
        conversation(f"<image>\nWhat {_HALF}?", image="good.png"),
        conversation(image=f"{_HALF}.png"),
        conversation(image={"path": f"{_HALF}.png"}),
        {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": f"b{_HALF}"}]},
    ],
    "malformed": [
        {"messages": [{"role": "user", "content": 5}, {"role": "assistant", "content": "a"}]},
        {"messages": [{"role": "user", "content": True}, {"role": "assistant", "content": "a"}]},
        {"messages": [{"role": "user", "content": {"a": 1}}, {"role": "assistant", "content": "a"}]},
        {"messages": 5},
        {"conversations": 5},
        {"conversations": [{"from": "human", "value": 5}, {"from": "gpt", "value": "a"}]},
        conversation(image={"bytes": "abc"}),
        conversation(image={"bytes": 5, "path": "good.png"}),
        conversation(image={"path": 5}),
        conversation(image=5),
        conversation(image=[["good.png"]]),
        {},
    ],
    "wrong role": [{"conversations": [{"from": ["human"], "value": "a"}, {"from": "gpt", "value": "b"}]}],
    "path escape": [conversation(image="../outside.png")],
}
_DIGITS = "9" * 5000
_UNREADABLE = [
    '{"conversations": VALUE}'.replace("VALUE", nested(960)),
    '{"conversations": VALUE}'.replace("VALUE", nested(50_000)),
    '{"conversations": [{"from": VALUE, "value": "a"}]}'.replace("VALUE", nested(960)),
    '{"extra": {"a": "]}[{\\"", "b": VALUE}, "conversations": 1}'.replace("VALUE", nested(3000)),
    '{"id": VALUE, "conversations": 1}'.replace("VALUE", _DIGITS),
    '{"conversations": [{"from": "human", "value": VALUE}]}'.replace("VALUE", _DIGITS),
]
# Kind and JSON text of each.
BAD = [(kind, json.dumps(record)) for kind, records in _OF_KINDS.items() for record in records]
BAD += [("malformed", text) for text in _UNREADABLE]


def counts() -> dict[str, int]:
    """How many there are of each kind."""
    kinds = [kind for kind, _ in BAD]
    return {kind: kinds.count(kind) for kind in kinds}


def in_file(samples: list[str], form: str) -> str:
    """The content of a file of these JSON texts: `json` or `jsonl`."""
    return "[" + ",\n".join(samples) + "]" if form == "json" else "\n".join(samples) + "\n"
