"""What the miniature's language model learns from before it sees: scenes in words, and questions about them."""

import functools
import itertools
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from .language import (
    CAPTION_PROMPT,
    EDGES,
    GROUNDED_PROMPT,
    Question,
    caption,
    count_question,
    edges_of_cells,
    grounding_question,
    questions,
    text_image,
)
from .world import CELLS, COLORS, SHAPES, Scene, World


_CAPTION_SHARE = 0.2
_WEIGHTS = {"grounding": 4.0, "count": 2.0}  # of answers, by kind of question; else 1
_ROOM = 160  # tokens of a text image and what is asked about it: attention's cost grows with their square


def text_batches(
    tokenizer, world: World, seed: int, size: int = 16, boxes: bool = True
) -> Iterator[dict[str, torch.Tensor]]:
    """Batches of text images, each with many questions that do not see each other, and the loss on the answers.

    Every question stands right behind its image, by position and by mask. Were they the turns of a conversation,
    much could be answered from what was said before, and the language model would learn to look things up in the
    image only after thousands of steps more.

    Returns:
        Endlessly `input_ids`, `position_ids`, `labels` and the labels' `weights`, (size, positions); `beside`,
        (size, positions), tokens that are said at the same time, -1 for none; `edges`, (size, positions, 24), as
        `language.edges_of_cells` has them, 0 outside the text image; and `attention_mask`, (size, 1, positions,
        positions), to be added to the scores of attention.
    """
    encode = functools.lru_cache(4096)(functools.partial(tokenizer.encode, add_special_tokens=False))
    scenes, rng = world.scenes("train", [seed, 1]), np.random.default_rng([seed, 200])
    start = [tokenizer.bos_token_id, *encode("USER:")]
    while True:
        told = list(itertools.islice(scenes, size))
        batch = _text_batch(
            [_text_sample(start, scene, rng, tokenizer, encode, boxes) for scene in told], tokenizer.pad_token_id
        )
        edges = np.zeros((*batch["input_ids"].shape, EDGES), np.float32)
        if boxes:
            edges[:, len(start) : len(start) + CELLS**2] = np.stack([edges_of_cells(scene) for scene in told])
        yield {**batch, "edges": torch.from_numpy(edges)}


class _Position(NamedTuple):
    token: int
    label: int
    weight: float
    part: int  # 0 for the image, then the number of the question; -1 for padding
    place: int
    beside: int = -1  # a second token that is said at the same time; -1 for none


def _text_sample(
    start: Sequence[int], scene: Scene, rng: np.random.Generator, tokenizer, encode: Callable, boxes: bool
) -> list[_Position]:
    """A text image and questions about it, each tokenized as the chat template writes it alone, as many as fit.

    The tokens of an answer weigh 1 together, for captions not to drown yes and no. Boxes weigh more, since they have
    four things to say, and numbers, since counting takes longest to learn.
    """
    sample = [_Position(token, -100, 0.0, 0, place) for place, token in enumerate(start)]
    for words in text_image(scene):
        token, *beside = (encode(f" {word}")[0] for word in words)
        sample.append(_Position(token, -100, 0.0, 0, len(sample), *beside))
    sample += [_Position(token, -100, 0.0, 0, place) for place, token in enumerate(encode("\n"), start=len(sample))]
    behind = len(sample)
    said = _asked_of_text(scene, rng, boxes)
    for part, chosen in enumerate(rng.permutation(len(said)), start=1):
        question = said[chosen]
        asked = encode(question.text) + encode(" ASSISTANT:")
        answered = [*encode(f" {question.answer}"), tokenizer.eos_token_id]
        if len(sample) + len(asked) + len(answered) > _ROOM:
            break
        labels = [-100] * len(asked) + answered
        weight = _WEIGHTS.get(question.kind, 1.0)
        for place, (token, label) in enumerate(zip(asked + answered, labels, strict=True), start=behind):
            sample.append(_Position(token, label, 0.0 if label == -100 else weight / len(answered), part, place))
    return sample


def _asked_of_text(scene: Scene, rng: np.random.Generator, boxes: bool) -> list[Question]:
    """Questions of each kind, drawn twice, the boxes of all things, more to count, and now and then a caption; none of
    them twice."""
    asked = [question for _ in range(2) for question in questions(scene, rng) if question.kind != "grounding"]
    there = sorted({attribute for thing in scene.things for attribute in (thing.color, thing.shape)})
    for attributes in (there, [*COLORS, *SHAPES]):
        asked.append(count_question(scene, attributes[rng.integers(len(attributes))]))
    if boxes:
        asked += [grounding_question(thing) for thing in scene.things]
    if rng.random() < _CAPTION_SHARE:
        asked.append(Question("caption", CAPTION_PROMPT, caption(scene)))
    if boxes and rng.random() < _CAPTION_SHARE / 2:
        asked.append(Question("caption", GROUNDED_PROMPT, caption(scene, boxes=True)))
    return list(dict.fromkeys(asked))


def _text_batch(samples: list[list[_Position]], pad: int) -> dict[str, torch.Tensor]:
    longest = max(map(len, samples))
    padding = _Position(pad, -100, 0.0, -1, 0)
    rows = [sample + [padding] * (longest - len(sample)) for sample in samples]
    tokens, labels, weights, parts, places, beside = (
        torch.tensor([[position[field] for position in row] for row in rows]) for field in range(6)
    )
    seen = (parts[:, None, :] == 0) | (parts[:, None, :] == parts[:, :, None])  # (size, positions, positions)
    seen &= torch.ones(longest, longest, dtype=torch.bool).tril()
    mask = torch.zeros(seen.shape, dtype=torch.bfloat16).masked_fill(~seen, torch.finfo(torch.bfloat16).min)
    batch = {"input_ids": tokens, "beside": beside, "labels": labels, "weights": weights}
    return {**batch, "position_ids": places, "attention_mask": mask[:, None]}


def weighted_loss(model: nn.Module, edge_layer: nn.Linear, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    """Mean cross-entropy of the labels, each with its weight."""
    embeddings = embed_text(model, edge_layer, batch["input_ids"], batch["beside"], batch["edges"])
    inputs = {name: batch[name] for name in ("position_ids", "attention_mask")}
    logits = model(inputs_embeds=embeddings, **inputs).logits
    labels, weights = batch["labels"][:, 1:].flatten(), batch["weights"][:, 1:].flatten()
    losses = F.cross_entropy(logits[:, :-1].float().flatten(0, 1), labels, reduction="none")  # 0 where there is none
    return (losses * weights).sum() / weights.sum()


def embed_text(
    model: nn.Module, edge_layer: nn.Linear, tokens: torch.Tensor, beside: torch.Tensor, edges: torch.Tensor
) -> torch.Tensor:
    """What the language model gets to read of a batch of text images, (size, positions, hidden size).

    Args:
        tokens: (size, positions).
        beside: tokens that are said at the same time, -1 for none, (size, positions).
        edges: `language.edges_of_cells`, (size, positions, 24).
    """
    embed = model.get_input_embeddings()
    second = embed(beside.clamp(min=0)) * (beside >= 0).unsqueeze(-1)
    return embed(tokens) + second + edge_layer(edges)
