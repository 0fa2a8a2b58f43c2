"""`convllava push`: publish a checkpoint on the Hub."""

import argparse
import sys

from ..errors import ConvLlavaError


def register(subparsers) -> None:
    parser = subparsers.add_parser(
        "push",
        help="publish a model or a LoRA adapter on the Hub",
        description="Publish a checkpoint on the Hub with a model card, after checking that it works for others. All "
        "of it becomes visible in one commit, or nothing.",
        allow_abbrev=False,
    )
    parser.add_argument("model", metavar="MODEL", help="folder of a full model or of a LoRA adapter")
    parser.add_argument("repo_id", metavar="REPO_ID", help="owner/name on the Hub; made if it is not there")
    card = parser.add_argument_group("the model card")
    card.add_argument("--license", metavar="ID", help="the license's id on the Hub, such as llama2 or apache-2.0")
    card.add_argument("--language", nargs="+", metavar="CODE", help="ISO 639 codes (default: en)")
    card.add_argument(
        "--about", metavar="FILE", help="YAML with what only you know: title, description, datasets, limits"
    )
    card.add_argument("--results", nargs="+", default=[], metavar="FILE", help="evaluation files (JSON)")
    card.add_argument(
        "--example",
        nargs=2,
        action="append",
        default=[],
        metavar=("IMAGE", "QUESTION"),
        help="shown on the page with the model's answer; may be given several times",
    )
    parser.add_argument(
        "--base-model", metavar="ID", help="for an adapter trained on a folder: the id of that model on the Hub"
    )
    parser.add_argument(
        "--max-shard-size", default="5GB", metavar="SIZE", help="of files of weights (default: %(default)s)"
    )
    parser.add_argument(
        "--trust-remote-code",
        action="store_true",
        help="run and publish Python code of the checkpoint that is not this package's",
    )
    hub = parser.add_argument_group("the repository")
    hub.add_argument("--private", action="store_true", help="make a new repository private")
    hub.add_argument("--revision", default="main", metavar="BRANCH", help="made if not there (default: %(default)s)")
    hub.add_argument("--create-pr", action="store_true", help="propose it as a pull request")
    hub.add_argument("--force", action="store_true", help="overwrite files that others have changed there")
    hub.add_argument(
        "--token",
        metavar="SOURCE",
        help="where the token is taken from: environment (HF_TOKEN) or login (default: the first that has one)",
    )
    hub.add_argument(
        "--space",
        nargs="?",
        const="",
        metavar="ID",
        help="also publish the demo as a Space (default ID: REPO_ID)",
    )
    hub.add_argument("--dry-run", action="store_true", help="check, and show files, sizes and card; upload nothing")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    if args.token not in (None, "environment", "login"):
        raise ConvLlavaError(
            "--token takes environment or login, not a token itself: a command line stays in the shell's history. Set "
            "HF_TOKEN, or run hf auth login."
        )
    from ..publish import About, push, read_about
    from ..publish.push import with_overrides

    about = with_overrides(read_about(args.about) if args.about else About(), args.license, args.language)
    print("Checking the files, and that the model loads and answers for somebody else ...", file=sys.stderr)
    pushed = push(
        args.model,
        args.repo_id,
        about=about,
        results=args.results,
        examples=args.example,
        base_model=args.base_model,
        private=args.private,
        revision=args.revision,
        create_pr=args.create_pr,
        force=args.force,
        dry_run=args.dry_run,
        token=args.token,
        space=None if args.space is None else args.space or args.repo_id,
        max_shard_size=args.max_shard_size,
        trust_remote_code=args.trust_remote_code,
    )
    _report(pushed, args)
    return 0


def _report(pushed, args: argparse.Namespace) -> None:
    if pushed.dry_run:
        print(f"Would publish {len(pushed.files)} files, {_size(sum(pushed.files.values()))}, to {pushed.repo_id}:\n")
        _print_files(pushed.files)
        if pushed.space_files:
            print(f"\nand {len(pushed.space_files)} files to the Space {args.space or pushed.repo_id}:\n")
            _print_files(pushed.space_files)
        if pushed.left_out:
            print(f"\nLeft out: {', '.join(pushed.left_out)}")
        print(f"\nREADME.md:\n\n{pushed.card}", end="")
        return
    for name in pushed.removed:
        print(f"Removed {name}, of an earlier push.")
    if pushed.url is None:
        print(f"{pushed.repo_id} holds all of it already.")
    else:
        print(f"Published {len(pushed.files)} files, {_size(sum(pushed.files.values()))}: {pushed.url}")
    if pushed.space_url:
        print(f"The demo: {pushed.space_url}")


def _print_files(files: dict[str, int]) -> None:
    for name, size in files.items():
        print(f"  {_size(size):>9}  {name}")


def _size(size: int) -> str:
    for number, unit in ((10**9, "GB"), (10**6, "MB"), (10**3, "kB")):
        if size >= number:
            return f"{size / number:.1f} {unit}"
    return f"{size} B"
