"""Tokenizers: SentencePiece models into fast tokenizers with the original's ids, and the image's placeholder."""

import json
import logging
import re
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, processors
from transformers import PreTrainedTokenizerFast

from ..errors import ConvLlavaError
from ..modeling.processing_convllava import IMAGE_TOKEN
from ..utils.json_files import read_json_object


logger = logging.getLogger(__name__)

_BLANK = "▁"  # SentencePiece's mark of a space
_NOT_BYTES = "\U0010fffe"  # no character, so in no text
_NORMAL, _USER_DEFINED = 1, 4  # SentencePiece's types of pieces
_MODEL_INPUTS = ["input_ids", "attention_mask"]  # the base class would add token types
_PROBES = (
    "A chat between a curious user",
    "\nWhat is this?",
    "  two  blanks,\ttab",
    "Straße № 5 — 표지판 🚲",
    "",
    "x" * 17,
)


def load_original_tokenizer(folder: Path) -> PreTrainedTokenizerFast:
    """The tokenizer of an original checkpoint, as a fast one with the same ids and with `<image>`.

    The original tokenizes with transformers' slow `LlamaTokenizer`. Here its SentencePiece model itself is read, so
    the result does not depend on the version of transformers.

    Raises:
        ConvLlavaError: there is no SentencePiece model, or one that is unlike Llama's.
    """
    if not (folder / "tokenizer.model").is_file():
        raise ConvLlavaError(
            f"{folder} has no tokenizer.model, the SentencePiece model of the original's tokenizer. Copy it from the "
            "language model that the checkpoint was trained from."
        )
    settings = _tokenizer_settings(folder)
    backend = sentencepiece_backend(folder / "tokenizer.model", settings)
    special = {key: _content(settings[key]) for key in ("bos_token", "eos_token", "unk_token")}
    pad_token = _content(settings.get("pad_token")) or special["unk_token"]
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend,
        **special,
        pad_token=pad_token,
        padding_side="left",
        model_max_length=settings.get("model_max_length", 2048),
        clean_up_tokenization_spaces=False,
        model_input_names=_MODEL_INPUTS,
        extra_special_tokens={"image_token": IMAGE_TOKEN},
    )
    _check_against_sentencepiece(folder / "tokenizer.model", tokenizer)
    return tokenizer


def sentencepiece_backend(model_file: Path, settings: dict) -> Tokenizer:
    """A `tokenizers.Tokenizer` that gives what the slow `LlamaTokenizer` with these settings gives.

    With `legacy` true the slow one puts SentencePiece's dummy prefix before every piece of text between special
    tokens; with `legacy` false only before the beginning of the text, unless a special token is there.

    Args:
        model_file: `tokenizer.model`.
        settings: tokenizer_config.json.
    """
    proto = _read_proto(model_file)
    vocabulary = {piece.piece: index for index, piece in enumerate(proto.pieces)}
    scores = {piece.piece: piece.score for piece in proto.pieces if piece.type == _NORMAL}
    unk, bos, eos = (_content(settings[key]) for key in ("unk_token", "bos_token", "eos_token"))
    backend = Tokenizer(
        models.BPE(
            vocab=vocabulary,
            merges=_merges(vocabulary, scores),
            unk_token=unk,
            fuse_unk=True,
            byte_fallback=proto.trainer_spec.byte_fallback,
        )
    )
    added = _added_tokens(settings, vocabulary, [unk, bos, eos])
    legacy = settings.get("legacy") is not False
    prefixed = proto.normalizer_spec.add_dummy_prefix if legacy else settings.get("add_prefix_space") is not False
    steps: list[Any] = [normalizers.Prepend(_BLANK)] if prefixed else []
    steps.append(normalizers.Replace(" ", _BLANK))
    if not legacy and prefixed:
        names = "|".join(re.escape(token.replace(" ", _BLANK)) for token in added)
        steps.append(normalizers.Replace(Regex(rf"\A{_BLANK}(?=(?:{names}))"), ""))
    backend.normalizer = normalizers.Sequence(steps)
    # `normalized` decides whether special tokens are found after the text has got its prefix, or cut it up before, so
    # that each piece of text between them gets one.
    backend.add_special_tokens([AddedToken(token, special=True, normalized=not legacy) for token in added])
    for token, index in added.items():
        if backend.token_to_id(token) != index:
            raise ConvLlavaError(
                f"tokenizer_config.json gives {token!r} the id {index}, but after the SentencePiece model's "
                f"{len(vocabulary)} pieces it would get {backend.token_to_id(token)}. The files do not match."
            )
    backend.decoder = _decoder(strip=prefixed)
    first = f"{bos} " if settings.get("add_bos_token") is not False else ""
    last = f" {eos}" if settings.get("add_eos_token") else ""
    backend.post_processor = processors.TemplateProcessing(
        single=f"{first}$A{last}",
        pair=f"{first}$A{last} {first}$B{last}",
        special_tokens=[(token, backend.token_to_id(token)) for token in {bos, eos}],
    )
    return backend


def add_image_token(tokenizer) -> int:
    """Makes `<image>` a special token of a language model's tokenizer, if it is none yet, and returns its id."""
    if tokenizer.convert_tokens_to_ids(IMAGE_TOKEN) in (None, tokenizer.unk_token_id):
        tokenizer.add_tokens([AddedToken(IMAGE_TOKEN, special=True, normalized=False)], special_tokens=True)
    return tokenizer.convert_tokens_to_ids(IMAGE_TOKEN)


def prefix_after(tokenizer, special_token: str) -> str:
    """What text after a special token must begin with to be tokenized like text on its own: `" "` or nothing.

    A blank for SentencePiece's tokenizers with `legacy: false`, which put their dummy prefix before the first text
    only.
    """

    def ids(text: str) -> list[int]:
        return tokenizer.encode(text, add_special_tokens=False)

    alone = ids("An image")
    if ids(special_token + "An image")[1:] != alone and ids(special_token + " An image")[1:] == alone:
        return " "
    return ""


def make_portable(folder: Path) -> None:
    """Rewrites tokenizer_config.json so that transformers 4 and 5 both take tokenizer.json as it is.

    transformers 5 names a class that 4 does not have, writes lists where 4 wants a table, and rebuilds tokenizers of
    classes that it knows from their vocabulary.
    """
    path = folder / "tokenizer_config.json"
    config = read_json_object(path, "The tokenizer")
    for key in ("backend", "is_local", "local_files_only", "add_bos_token", "add_eos_token", "add_prefix_space"):
        config.pop(key, None)
    extra = config.pop("extra_special_tokens", None)
    others = list(extra) if isinstance(extra, list) else config.get("additional_special_tokens") or []
    others = [token for token in others if _content(token) != IMAGE_TOKEN]
    config.pop("additional_special_tokens", None)
    if others:
        config["additional_special_tokens"] = others
    config["extra_special_tokens"] = {"image_token": IMAGE_TOKEN}
    config["image_token"] = IMAGE_TOKEN
    config["model_input_names"] = _MODEL_INPUTS
    config["tokenizer_class"] = "PreTrainedTokenizerFast"
    path.write_text(json.dumps(config, indent=2, ensure_ascii=False, sort_keys=True) + "\n", encoding="utf-8")


def _tokenizer_settings(folder: Path) -> dict:
    settings: dict[str, Any] = {"unk_token": "<unk>", "bos_token": "<s>", "eos_token": "</s>"}
    for name in ("special_tokens_map.json", "tokenizer_config.json"):
        if (folder / name).is_file():
            values = read_json_object(folder / name, "The tokenizer")
            settings.update({key: value for key, value in values.items() if value is not None})
    if (folder / "added_tokens.json").is_file():
        ids = read_json_object(folder / "added_tokens.json", "The tokenizer")
        decoder = {str(index): token for token, index in ids.items()}
        settings["added_tokens_decoder"] = {**decoder, **settings.get("added_tokens_decoder", {})}
    return settings


def _read_proto(model_file: Path):
    # sentencepiece brings the description of its own format, which needs protobuf.
    from google.protobuf.message import DecodeError
    from sentencepiece import sentencepiece_model_pb2

    proto = sentencepiece_model_pb2.ModelProto()  # pyright: ignore[reportAttributeAccessIssue]
    try:
        proto.ParseFromString(model_file.read_bytes())
    except DecodeError:
        raise ConvLlavaError(f"{model_file} is no SentencePiece model. Download it again.") from None
    normalizer = proto.normalizer_spec
    unlike = []
    if proto.trainer_spec.model_type != 2:
        unlike.append("its model is not BPE")
    if normalizer.precompiled_charsmap:
        unlike.append(f"it normalizes text ({normalizer.name})")
    if normalizer.remove_extra_whitespaces or not normalizer.escape_whitespaces:
        unlike.append("it changes blanks")
    if any(piece.type == _USER_DEFINED for piece in proto.pieces):
        unlike.append("it has user-defined pieces")
    if unlike:
        raise ConvLlavaError(
            f"{model_file} is unlike the SentencePiece models of Llama and Vicuna, which the original uses: "
            f"{', '.join(unlike)}. It cannot be converted."
        )
    return proto


def _decoder(strip: bool):
    """Tokens to text as SentencePiece does it, bytes that are no UTF-8 included, in steps that look like Llama's.

    Llama's are Replace, ByteFallback, Fuse and Strip. Other tools read from them how the vocabulary writes bytes
    (transformers for `stop_strings`, llguidance, outlines, xgrammar): as `<0x0A>`, not in an alphabet like GPT-2's.

    ByteFallback by itself gives up a whole run of bytes if one of them is wrong, such as the newline before half a
    character. ByteLevel does not, but speaks GPT-2's alphabet, whose letters are in ordinary tokens too; a mark that
    is in no alphabet keeps those as they are. So bytes are written in that alphabet first, and ByteFallback, which
    then finds none, changes nothing. What does this is put into inner sequences, where those tools do not look:
    outlines refuses regular expressions, and all of them take ByteLevel for the way the vocabulary is written.
    """
    to_letters = [
        decoders.Replace(Regex(r"^(?=[\s\S]*[^\x00-\x7f])"), _NOT_BYTES),
        *(decoders.Replace(f"<0x{byte:02X}>", letter) for byte, letter in _byte_alphabet().items()),
    ]
    to_text = [decoders.ByteLevel(), decoders.Replace(_NOT_BYTES, "")]
    steps = [
        decoders.Replace(_BLANK, " "),
        decoders.Sequence(to_letters),
        decoders.ByteFallback(),
        decoders.Sequence(to_text),
        decoders.Fuse(),
    ]
    return decoders.Sequence([*steps, decoders.Strip(" ", 1, 0)] if strip else steps)


def _byte_alphabet() -> dict[int, str]:
    """GPT-2's letter for each byte: itself where Latin-1 has something visible, else the next one after Latin-1."""
    visible = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = [byte for byte in range(0x100) if byte not in visible]
    return {byte: chr(byte if byte in visible else 0x100 + others.index(byte)) for byte in range(0x100)}


def _merges(vocabulary: dict[str, int], scores: dict[str, float]) -> list[tuple[str, str]]:
    """Every pair of pieces that makes a piece, best-scored pieces first: the order that SentencePiece merges in."""
    merges = []
    for piece, score in scores.items():
        for cut in range(1, len(piece)):
            left, right = piece[:cut], piece[cut:]
            if left in scores and right in scores:
                merges.append((-score, vocabulary[left], vocabulary[right], left, right))
    return [(left, right) for *_, left, right in sorted(merges)]


def _added_tokens(settings: dict, vocabulary: dict[str, int], special: list[str]) -> dict[str, int]:
    """Special tokens and those added to the SentencePiece model, in the order of their ids, and `<image>`."""
    tokens = {}
    for token in special:
        if token not in vocabulary:
            raise ConvLlavaError(f"The special token {token!r} is no piece of the SentencePiece model.")
        tokens[token] = vocabulary[token]
    for index, token in settings.get("added_tokens_decoder", {}).items():
        tokens[_content(token)] = int(index)
    pad_token = _content(settings.get("pad_token"))
    size = max(len(vocabulary), *(index + 1 for index in tokens.values()))
    for token in (pad_token, IMAGE_TOKEN):
        if token and token not in tokens:
            tokens[token] = vocabulary.get(token, size)
            size = max(size, tokens[token] + 1)
    return dict(sorted(tokens.items(), key=lambda item: item[1]))


def _check_against_sentencepiece(model_file: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    from sentencepiece import SentencePieceProcessor

    reference = SentencePieceProcessor(model_file=str(model_file))
    image_id = tokenizer.convert_tokens_to_ids(IMAGE_TOKEN)
    suffix = prefix_after(tokenizer, IMAGE_TOKEN)
    for text in _PROBES:
        expected = reference.encode(text)
        after_image = IMAGE_TOKEN + suffix + text if text else IMAGE_TOKEN
        for given, ids in ((text, expected), (after_image, [image_id, *expected])):
            if (found := tokenizer.encode(given, add_special_tokens=False)) != ids:
                raise ConvLlavaError(
                    f"The converted tokenizer gives {given!r} the ids {found}, but SentencePiece gives {ids}. Please "
                    "report this with the tokenizer's files."
                )


def _content(token) -> str | None:
    """The text of a token that is written as a string or as a table."""
    return token.get("content") if isinstance(token, dict) else token
