"""The model card: MODEL_CARD.md filled in, its metadata, and whether the Hub will understand it."""

import re
from dataclasses import dataclass, field
from importlib import resources
from typing import Any

import jinja2
import yaml
from huggingface_hub import ModelCard, ModelCardData

from ..errors import ConvLlavaError
from .markdown import cell
from .metadata import About, lineage, model_metadata
from .preflight import WidgetExample
from .results import TASK, Result, table_rows, to_eval_results
from .staging import StagedRepo, is_hub_id


TEMPLATE = "MODEL_CARD.md"
_TAGS = ("convllava", "multimodal", "vision-language", "conversational", "convnext", "custom_code")


@dataclass
class CardInput:
    """What a card is made of, besides the files."""

    repo_id: str
    about: About
    results: list[Result] = field(default_factory=list)
    examples: list[WidgetExample] = field(default_factory=list)
    answers: list[str] = field(default_factory=list)
    revision: str = "main"


def render_card(staged: StagedRepo, given: CardInput) -> str:
    """The card as a text: metadata in YAML, then the page.

    Raises:
        ConvLlavaError: the metadata would not be understood by the Hub.
    """
    about, history = given.about, lineage(staged, given.about)
    metadata = _metadata(staged, given, history)
    environment = jinja2.Environment(
        undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True, keep_trailing_newline=True
    )
    template = resources.files("convllava_hf.publish").joinpath(TEMPLATE).read_text(encoding="utf-8")
    page = environment.from_string(template).render(
        title=about.title or given.repo_id.rpartition("/")[2],
        repo_id=given.repo_id,
        revision=given.revision,
        about=about,
        adapter=staged.base_model is not None,
        base_model=staged.base_model,
        model=model_metadata(staged),
        lineage=history,
        has_curve="loss.png" in staged.names(),
        rows=table_rows(given.results),
        measured=bool(given.results),
        examples=[
            {"image": shown.name, "question": shown.question, "answer": answer}
            for shown, answer in zip(given.examples, given.answers, strict=True)
        ],
        license_text=about.license_name if about.license == "other" else about.license,
        linked=_linked,
        quote=_quoted,
        escape=_escaped,
    )
    card = f"---\n{metadata.to_yaml()}\n---\n\n{re.sub(chr(10) + '{3,}', chr(10) * 2, page).strip()}\n"
    check_card(card, staged)
    return card


def check_card(card: str, staged: StagedRepo) -> None:
    """Reads the card back as the Hub does.

    Raises:
        ConvLlavaError: what is wrong with its metadata.
    """
    try:
        parsed = ModelCard(card, ignore_metadata_errors=False)
        data: dict[str, Any] = parsed.data.to_dict()
        About(
            license=data.get("license"),
            license_name=data.get("license_name"),
            license_link=data.get("license_link"),
            language=data.get("language") or [],
        ).check()
    except ConvLlavaError:
        raise
    except (ValueError, yaml.YAMLError) as error:
        raise ConvLlavaError(f"The card's metadata cannot be read back: {error}") from error
    if data.get("pipeline_tag") != TASK or data.get("library_name") not in ("transformers", "peft"):
        raise ConvLlavaError("The card's metadata lack pipeline_tag or library_name.")
    for key in ("base_model", "datasets"):
        for identity in data.get(key) or []:
            if not is_hub_id(identity):
                raise ConvLlavaError(f"The card's {key} has {identity!r}, which is no id on the Hub (owner/name).")
    names = set(staged.names())
    images = [example["src"] for example in data.get("widget") or []]
    images += re.findall(r"!\[[^\]]*\]\((?!https?:)([^)\s]+)\)", parsed.text)
    if lacking := sorted(set(images) - names):
        raise ConvLlavaError(f"The card shows {', '.join(lacking)}, which would not be uploaded.")


def _metadata(staged: StagedRepo, given: CardInput, history: dict[str, Any]) -> ModelCardData:
    about = given.about
    adapter = staged.base_model is not None
    relation = {}
    if adapter:
        relation["base_model_relation"] = "adapter"
    elif history["base_models"] and (history["stages"] or not history["checkpoint"]):  # converting trains nothing
        relation["base_model_relation"] = "finetune"
    values = {
        "language": about.language or ["en"],
        "license": about.license,
        "license_name": about.license_name,
        "license_link": about.license_link,
        "library_name": "peft" if adapter else "transformers",
        "pipeline_tag": TASK,
        "base_model": history["base_models"] or None,
        **relation,
        "datasets": [row["id"] for row in history["data"] if row["id"]] or None,
        "tags": list(dict.fromkeys([*_TAGS, *(["lora"] if adapter else []), *about.tags])),
        "widget": [
            {"text": shown.question, "src": shown.name, "output": {"text": answer}}
            for shown, answer in zip(given.examples, given.answers, strict=True)
        ]
        or None,
    }
    if given.results:
        values |= {"model_name": given.repo_id, "eval_results": to_eval_results(given.results)}
    return ModelCardData(**{key: value for key, value in values.items() if value is not None})


def _linked(name: str) -> str:
    """A cell with a source, as a link where it is an id on the Hub and no path of somebody's machine."""
    return f"[{cell(name)}](https://huggingface.co/{name})" if is_hub_id(name) else cell(name)


def _quoted(text: str) -> str:
    """A text as a Markdown quotation, which nothing in it can end."""
    return "\n".join(f"> {line}".rstrip() for line in _escaped(text).splitlines() or [""])


def _escaped(text: str) -> str:
    """A text of which Markdown and HTML make nothing, without control characters."""
    readable = "".join(one for one in text if one.isprintable() or one == "\n")
    return re.sub(r"([\\`*_\[\]<>#|~$])", r"\\\1", readable)
