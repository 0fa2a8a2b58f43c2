"""Stage 0: small stand-ins for CLIP's ConvNeXt and for Vicuna, trained from nothing on the miniature world."""

import functools
import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import nn
from transformers import (
    ConvNextConfig,
    ConvNextModel,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
)

from ..convert.writing import new_checkpoint_folder
from .drawing import draw_sign, draw_thing
from .language import (
    CAPTION_PROMPT,
    EDGES,
    GROUNDED_PROMPT,
    Mix,
    Question,
    caption,
    conversation,
    count_question,
    edges_of_cells,
    grounding_question,
    questions,
    text_picture,
)
from .world import CELLS, COLORS, SHAPES, UNITS, Scene, Sign, Thing, World


# Vicuna's roles without its system message, which would be longer than the conversations here.
CHAT_TEMPLATE = (
    "{{- bos_token -}}"
    "{%- for message in messages -%}"
    "{%- if message['role'] == 'assistant' -%}"
    "{{- 'ASSISTANT:' -}}{%- generation -%}{{- ' ' + message['content'] + eos_token -}}{%- endgeneration -%}"
    "{%- else -%}{{- 'USER: ' + message['content'] + ' ' -}}{%- endif -%}"
    "{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{- 'ASSISTANT:' -}}{%- endif -%}"
)
# Words, coordinates with the sign beside them, digits, other signs: each with the blank before it. So a box is four
# tokens, and a token says which edge it is.
_PIECES = r" ?[A-Za-z]+| ?\[?\d\.\d\d[,\]]?| ?\d| ?[^\sA-Za-z\d]|\s"
_CAPTION_SHARE = 0.2
_WEIGHTS = {"grounding": 4.0, "count": 2.0}  # of answers, by kind of question; else 1
# Of Muon, for the matrices of each. At 0.02 some seeds of the language model never learn to look up colours.
_TOWER_RATE, _LANGUAGE_RATE = 0.02, 0.01
# Deviation of embeddings at first. A projector's output is about as long. If words were much shorter, what attention
# adds at the place of a word, as which row and column it stands in, would be lost on the long visual tokens.
_EMBEDDING = 1.0
_ROOM = 160  # tokens of a text picture and what is asked about it: attention's cost grows with their square

OnStep = Callable[[int, int, float], None]  # steps done, steps in all, loss


def train_tower(
    folder: Path, *, steps: int, seed: int, sizes: tuple[int, int] | None = None, on_step: OnStep | None = None
) -> Path:
    """Trains a four-stage ConvNeXt to say what is at every place of pictures of 128 x 128 pixels, and saves it.

    Of each place it learns the name of what is there and how far that reaches. Places are asked about one by one,
    since they are what a language model gets to see: features that only their average has to name say little at any
    of them.

    Args:
        folder: a transformers folder to make.
        sizes: of what is in the pictures, in pixels, smallest and largest; default: `SIZES`.
    """
    torch.manual_seed(seed)
    config = ConvNextConfig(
        depths=[1, 1, 2, 1],
        hidden_sizes=[16, 32, 64, 128],
        image_size=_SIDE,
        initializer_range=0.1,
        layer_scale_init_value=1.0,
    )
    tower = ConvNextModel(config).to(memory_format=torch.channels_last)
    head = nn.Sequential(nn.LayerNorm(config.hidden_sizes[-1]), nn.Linear(config.hidden_sizes[-1], len(_NAMES) + 4))
    rng = np.random.default_rng([seed, 100])
    weights = torch.ones(len(_NAMES))
    weights[_NAMES.index("ground")] = 0.1  # most places are

    def loss() -> torch.Tensor:
        batch = [labelled_picture(rng, sizes or SIZES) for _ in range(_TOWER_BATCH)]
        pictures, names, edges = map(np.stack, zip(*batch, strict=True))
        pixels = torch.from_numpy(pictures).permute(0, 3, 1, 2).float() / 127.5 - 1
        features = tower(pixels.contiguous(memory_format=torch.channels_last)).last_hidden_state
        said = head(features.float().permute(0, 2, 3, 1)).flatten(0, 2)  # (N, C, H, W) -> (N*H*W, names and 4 edges)
        targets = torch.from_numpy(names).flatten()
        there = targets != _NAMES.index("ground")
        reach = F.smooth_l1_loss(said[there, len(_NAMES) :], torch.from_numpy(edges).flatten(0, 2)[there])
        return F.cross_entropy(said[:, : len(_NAMES)], targets, weight=weights) + reach

    _fit(nn.ModuleList([tower, head]), loss, steps, (_TOWER_RATE, 5e-3), on_step)
    with new_checkpoint_folder(folder, overwrite=True) as new:
        tower.save_pretrained(new)
    return folder


def train_language_model(
    folder: Path,
    *,
    steps: int,
    seed: int,
    world: World | None = None,
    boxes: bool = True,
    on_step: OnStep | None = None,
) -> Path:
    """Trains a small Llama to talk about scenes that it is told of in words, and saves it with its tokenizer.

    The words of a cell are said at once: their embeddings are added. Where a thing is exactly is no word; it is told
    as `language.edges_of_cells`, added by a linear layer that is needed here only. The projector will have the same to
    say in the same place.

    Args:
        folder: a transformers folder to make.
        boxes: whether it is told and asked where things are.
    """
    torch.manual_seed(seed)
    world = world or World()
    tokenizer = make_tokenizer(world)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=128,
        intermediate_size=336,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=4,
        max_position_embeddings=1024,
        initializer_range=0.05,
        tie_word_embeddings=False,
        attn_implementation="eager",  # SDPA backward is slow on a CPU
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    model = LlamaForCausalLM(config)
    edges = nn.Linear(EDGES, config.hidden_size, bias=False)
    nn.init.normal_(model.get_input_embeddings().weight, std=_EMBEDDING)
    nn.init.normal_(edges.weight, std=_EMBEDDING / math.sqrt(EDGES / 2))  # as long as embeddings are
    batches = text_batches(tokenizer, world, seed, boxes=boxes)
    loss = lambda: _weighted_loss(model, edges, next(batches))  # noqa: E731
    _fit(nn.ModuleList([model, edges]), loss, steps, (_LANGUAGE_RATE, 2e-3), on_step)
    with new_checkpoint_folder(folder, overwrite=True) as new:
        model.save_pretrained(new)
        tokenizer.save_pretrained(new)
    return folder


def make_tokenizer(world: World | None = None) -> PreTrainedTokenizerFast:
    """A byte-level tokenizer that can write everything and has one token for each word of the miniature world."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(_PIECES), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=2000,
        min_frequency=2,
        special_tokens=["<pad>", "<s>", "</s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(_texts(world or World(), 3000), trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<s>",
        eos_token="</s>",
        pad_token="<pad>",
        padding_side="left",
        model_max_length=1024,
        model_input_names=["input_ids", "attention_mask"],
        chat_template=CHAT_TEMPLATE,
        clean_up_tokenization_spaces=False,
    )


# What can be at a place: any coloured shape, a sign with any digit, or nothing.
_NAMES = [*((color, shape) for color in COLORS for shape in SHAPES), *range(10), "ground"]
_SIDE = 128  # pixels of the tower's pictures
_STRIDE = 32  # pixels of the four-stage tower
SIZES = (48, 102)  # pixels of what is in them: as large as in scenes of 256 pixels
_TOWER_BATCH = 16


def labelled_picture(
    rng: np.random.Generator, sizes: tuple[int, int] = SIZES
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """A picture of up to three things with sides of so many pixels, and what is at its places.

    Returns:
        The picture, (128, 128, 3) of 0-255. The index of what is at the centre of each place, (4, 4). How far that
        reaches from there to the left, top, right and bottom, (4, 4, 4) in strides.
    """
    grey = rng.integers(85, 200)
    picture = Image.new("RGB", (_SIDE, _SIDE), tuple(int(value) for value in grey + rng.integers(-15, 16, 3)))
    places = _SIDE // _STRIDE
    names = np.full((places, places), _NAMES.index("ground"))
    edges = np.zeros((places, places, 4), np.float32)
    unit = _SIDE / UNITS
    taken: list[tuple[float, ...]] = []
    for _ in range(3):
        side = math.exp(rng.uniform(*np.log(sizes))) / unit
        left, top = rng.uniform(0, UNITS - side, 2)
        box = (left, top, left + side, top + side)
        if any(box[0] < o[2] and o[0] < box[2] and box[1] < o[3] and o[1] < box[3] for o in taken):
            continue
        taken.append(box)
        if rng.random() < 0.5:
            name = int(rng.integers(len(COLORS) * len(SHAPES)))
            draw_thing(picture, Thing(*_NAMES[name], box), unit)
        else:
            digit, handwriting = int(rng.integers(10)), int(rng.integers(2**31))
            name = _NAMES.index(digit)
            draw_sign(picture, Sign(digit, box, handwriting if rng.random() < 0.5 else None), unit, "train")
        in_strides = np.array(box) * unit / _STRIDE
        for row, column in _places_of(in_strides):
            names[row, column] = name
            edges[row, column] = in_strides - np.array([column, row, column, row]) - 0.5
    return np.asarray(picture), names, edges


def _places_of(box: np.ndarray) -> Iterator[tuple[int, int]]:
    """Row and column of the places whose centres are in a box, in strides; or of the one that holds the box's own."""
    left, top, right, bottom = box.round().astype(int)
    rows, columns = range(top, bottom), range(left, right)
    if not rows:
        rows = (int((box[1] + box[3]) / 2),)
    if not columns:
        columns = (int((box[0] + box[2]) / 2),)
    return itertools.product(rows, columns)


def _texts(world: World, scenes: int) -> Iterator[str]:
    """Everything that is said, first and later in a conversation: with a line break or a blank before the question."""
    rng = np.random.default_rng(0)
    for scene in itertools.islice(world.scenes("train", seed=0), scenes):
        for question, answer in conversation(scene, rng, Mix(0.2, 0.2, 0.3)):
            words = " ".join(itertools.chain(*text_picture(scene)))
            yield f"USER: {words}\n{question} ASSISTANT: {answer}"
            yield f"USER: {question} ASSISTANT: {answer}"


def text_batches(
    tokenizer, world: World, seed: int, size: int = 16, boxes: bool = True
) -> Iterator[dict[str, torch.Tensor]]:
    """Batches of text pictures, each with many questions that do not see each other, and the loss on the answers.

    Every question stands right behind its picture, by position and by mask. Were they the turns of a conversation,
    much could be answered from what was said before, and the language model would learn to look things up in the
    picture only after thousands of steps more.

    Returns:
        Endlessly `input_ids`, `position_ids`, `labels` and the labels' `weights`, (size, positions); `beside`,
        (size, positions), tokens that are said at the same time, -1 for none; `edges`, (size, positions, 24), as
        `language.edges_of_cells` has them, 0 outside the text picture; and `attention_mask`, (size, 1, positions,
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
    part: int  # 0 for the picture, then the number of the question; -1 for padding
    place: int
    beside: int = -1  # a second token that is said at the same time; -1 for none


def _text_sample(
    start: Sequence[int], scene: Scene, rng: np.random.Generator, tokenizer, encode: Callable, boxes: bool
) -> list[_Position]:
    """A text picture and questions about it, each tokenized as the chat template writes it alone, as many as fit.

    The tokens of an answer weigh 1 together, for captions not to drown yes and no. Boxes weigh more, since they have
    four things to say, and numbers, since counting takes longest to learn.
    """
    sample = [_Position(token, -100, 0.0, 0, place) for place, token in enumerate(start)]
    for words in text_picture(scene):
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


def _weighted_loss(model: nn.Module, edges: nn.Linear, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    """Mean cross-entropy of the labels, each with its weight."""
    embeddings = embed_text(model, edges, batch["input_ids"], batch["beside"], batch["edges"])
    inputs = {name: batch[name] for name in ("position_ids", "attention_mask")}
    logits = model(inputs_embeds=embeddings, **inputs).logits
    labels, weights = batch["labels"][:, 1:].flatten(), batch["weights"][:, 1:].flatten()
    losses = F.cross_entropy(logits[:, :-1].float().flatten(0, 1), labels, reduction="none")  # 0 where there is none
    return (losses * weights).sum() / weights.sum()


def embed_text(
    model: nn.Module, edges: nn.Linear, tokens: torch.Tensor, beside: torch.Tensor, places: torch.Tensor
) -> torch.Tensor:
    """What the language model gets to read of a batch of text pictures, (size, positions, hidden size).

    Args:
        tokens: (size, positions).
        beside: tokens that are said at the same time, -1 for none, (size, positions).
        places: `language.edges_of_cells`, (size, positions, 24).
    """
    embed = model.get_input_embeddings()
    second = embed(beside.clamp(min=0)) * (beside >= 0).unsqueeze(-1)
    return embed(tokens) + second + edges(places)


def _fit(
    model: nn.Module, loss_of_step: Callable, steps: int, rates: tuple[float, float], on_step: OnStep | None
) -> None:
    """Trains with warm-up and cosine decay, in bfloat16 where it saves time.

    Args:
        rates: of the layers' matrices and of everything else.
    """
    optimizers = _optimizers(model, *rates)
    warmup = max(5, steps // 20)
    schedules = [
        torch.optim.lr_scheduler.LambdaLR(
            optimizer,
            lambda step: min((step + 1) / warmup, 1) * (0.05 + 0.475 * (1 + math.cos(math.pi * min(1, step / steps)))),
        )
        for optimizer in optimizers
    ]
    for step in range(1, steps + 1):
        with torch.autocast("cpu", torch.bfloat16):
            loss = loss_of_step()
        model.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for stepper in (*optimizers, *schedules):
            stepper.step()
        if on_step:
            on_step(step, steps, loss.item())


def _optimizers(model: nn.Module, matrix_rate: float, rate: float) -> list[torch.optim.Optimizer]:
    """Muon for the matrices of the layers, AdamW for everything else.

    With AdamW alone, a language model of this size stays for thousands of steps where it answers from what is in the
    picture somewhere, before it learns to look up what belongs together.
    """
    matrices, others = [], []
    for name, parameter in model.named_parameters():
        (matrices if parameter.ndim == 2 and ".layers." in name else others).append(parameter)
    return [
        torch.optim.Muon(matrices, lr=matrix_rate, momentum=0.95, weight_decay=0.0),
        torch.optim.AdamW(others, lr=rate, betas=(0.9, 0.98), weight_decay=0.0),
    ]
