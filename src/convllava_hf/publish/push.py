"""`push`: a checkpoint becomes a page on the Hub, after it was checked as somebody else would use it."""

import logging
import os
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from PIL import Image

from ..errors import ConvLlavaError, first_line
from ..modeling.image_utils_convllava import ImageError, open_image, to_rgb
from ..utils.atomic import temporary_folder
from .card import CardInput, render_card
from .hub_upload import Publisher, Target, check_target, find_token
from .metadata import About
from .preflight import WidgetExample, check_files, run_smoke_test
from .results import read_results
from .staging import CARD, LOADED, MAX_SHARD_SIZE, StagedRepo, stage


logger = logging.getLogger(__name__)

_MAX_EXAMPLE_PIXELS = 4096 * 4096


@dataclass
class Pushed:
    """What was, or with `dry_run` would be, published.

    `files`: path -> bytes. `left_out`: names in the checkpoint that stay here. `card`: its text. `answers`: to the
    examples, from the check. `removed`: files of an earlier push that were taken away. `url`: of the commit or pull
    request, `None` if the repository held all of it already or for a dry run. `space_url`: of the Space.
    """

    repo_id: str
    files: dict[str, int] = field(default_factory=dict)
    left_out: list[str] = field(default_factory=list)
    card: str = ""
    answers: list[str] = field(default_factory=list)
    removed: list[str] = field(default_factory=list)
    url: str | None = None
    space_files: dict[str, int] = field(default_factory=dict)
    space_url: str | None = None
    dry_run: bool = False


def push(
    model: str | os.PathLike,
    repo_id: str,
    *,
    about: About,
    results: Sequence[str | os.PathLike] = (),
    examples: Sequence[tuple[str | os.PathLike, str]] = (),
    base_model: str | None = None,
    private: bool = False,
    revision: str = "main",
    create_pr: bool = False,
    force: bool = False,
    dry_run: bool = False,
    token: str | None = None,
    space: str | None = None,
    max_shard_size: int | str = MAX_SHARD_SIZE,
    trust_remote_code: bool = False,
) -> Pushed:
    """Publishes the checkpoint in a folder, in one commit.

    Args:
        model: folder of a full model or of a LoRA adapter.
        repo_id: owner/name on the Hub; made if it is not there.
        about: what only the publisher knows, such as the license.
        results: evaluation files, see `results`.
        examples: images and questions; the model's answers come from the check. Images are uploaded without their
            metadata.
        base_model: for an adapter, the id of the model that it was trained on, where its config names a path.
        private: whether a new repository is private.
        revision: the branch; made from main if it is not there.
        create_pr: propose the commit as a pull request.
        force: overwrite files that others have changed on the Hub.
        dry_run: check and render, upload nothing and ask the Hub nothing about the repository.
        token: `"environment"` or `"login"`, to take the token only from there.
        space: id of a Space that gets the demo of this model, in a commit of its own after the model's.
        max_shard_size: larger files of weights are rewritten in shards of this size.
        trust_remote_code: publish code of the checkpoint that is not this package's, and run it in the check, which
            is done without otherwise; for an adapter, run the base model's own code too.

    Raises:
        ConvLlavaError: something must not be published, the Hub refuses it, or others have changed files there.
    """
    target = Target(str(repo_id), revision=revision, create_pr=create_pr, private=private)
    space_target = Target(space, kind="space", private=private) if space else None
    for one in filter(None, (target, space_target)):
        check_target(one)
    about.check()
    measured = read_results(*results)
    secret = find_token(token, required=not dry_run)
    publisher = None if dry_run or secret is None else Publisher(secret)
    if publisher is not None:
        for one in filter(None, (target, space_target)):
            publisher.check_access(one)
    with temporary_folder("convllava-push-") as folder:
        staged = stage(
            model,
            folder,
            base_model=base_model,
            max_shard_size=max_shard_size,
            trust_remote_code=trust_remote_code,
        )
        if staged.refused:
            raise ConvLlavaError(f"Not published. {' '.join(staged.refused)}")
        if space_target is not None and staged.base_model:
            raise ConvLlavaError(
                "The demo shows a full model, no adapter: merge it (merge_and_unload) and push the merged model, and "
                "leave --space out here."
            )
        shown = [_stage_example(staged, number, *one) for number, one in enumerate(examples, 1)]
        check_files(staged, secret)
        logger.info("Loading the model in a fresh process from what will be published.")
        answers = run_smoke_test(staged, shown, secret, trust_remote_code)
        given = CardInput(target.repo_id, about, measured, shown, answers[: len(shown)], revision)
        pushed = _with_card(staged, given, secret)
        pushed.answers, pushed.dry_run = answers, dry_run
        if publisher is not None:
            files = {name: staged.folder / name for name in staged.names()}
            title = f"Publish {Path(model).resolve().name}"
            committed = publisher.publish(target, files, message=title, managed=LOADED, force=force)
            pushed.url, pushed.removed = committed.url, committed.plan.removed
    if space_target is not None:
        _push_space(pushed, publisher, space_target, force)
    return pushed


def _with_card(staged: StagedRepo, given: CardInput, secret: str | None) -> Pushed:
    """What will be published, after the card was written and all files were checked."""
    card = render_card(staged, given)
    (staged.folder / CARD).write_text(card, encoding="utf-8")
    check_files(staged, secret)
    files = {name: staged.size(name) for name in staged.names()}
    return Pushed(given.repo_id, files, left_out=staged.left_out, card=card)


def _push_space(pushed: Pushed, publisher: Publisher | None, target: Target, force: bool) -> None:
    from ..demo import space_files  # its dependencies are an extra's

    files = {name: content.encode() for name, content in space_files(pushed.repo_id).items()}
    pushed.space_files = {name: len(content) for name, content in files.items()}
    if publisher is None:
        return
    try:
        publisher.publish(target, files, message=f"Publish the demo of {pushed.repo_id}", force=force)
    except ConvLlavaError as error:
        raise ConvLlavaError(f"The model is published, its Space is not. {error}") from error
    pushed.space_url = f"{publisher.api.endpoint}/spaces/{target.repo_id}"


def _stage_example(staged: StagedRepo, number: int, image: str | os.PathLike, question: str) -> WidgetExample:
    """Writes an image among the files: its pixels, and nothing else that the file knows (place, camera, name)."""
    if not question.strip():
        raise ConvLlavaError(f"The example {os.fspath(image)!r} comes without a question.")
    try:
        with open_image(str(os.fspath(image)), repr(os.fspath(image))) as opened:
            if opened.width * opened.height > _MAX_EXAMPLE_PIXELS:
                raise ConvLlavaError(
                    f"The example {os.fspath(image)!r} has {opened.width} x {opened.height} pixels, too many for a "
                    "page: make it smaller."
                )
            suffix = "jpg" if opened.format in ("JPEG", "MPO") else "png"
            pixels = to_rgb(opened, repr(os.fspath(image)))
    except (OSError, ImageError) as error:
        raise ConvLlavaError(f"Cannot read the image {os.fspath(image)!r}: {first_line(error)}") from error
    shown = WidgetExample(" ".join(question.split()), f"examples/example-{number}.{suffix}")
    path = staged.folder / str(shown.name)
    path.parent.mkdir(exist_ok=True)
    clean = Image.frombytes("RGB", pixels.size, pixels.tobytes())
    options: dict[str, Any] = {"quality": 95} if suffix == "jpg" else {"optimize": True}
    clean.save(path, **options)
    return shown


def with_overrides(about: About, license: str | None = None, language: Sequence[str] | None = None) -> About:
    """`about` with what the command line says over it."""
    changes = {"license": license, "language": list(language) if language else None}
    return replace(about, **{key: value for key, value in changes.items() if value is not None})
