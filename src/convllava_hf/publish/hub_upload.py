"""One commit to the Hub, or none: which files differ, whether somebody else changed them, and the commit itself."""

import hashlib
import logging
import os
import re
import sys
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi, constants, get_token
from huggingface_hub.errors import HfHubHTTPError, RepositoryNotFoundError, RevisionNotFoundError
from huggingface_hub.hf_api import RepoFile

from ..errors import ConvLlavaError, first_line
from ..utils.repo_ids import is_repo_id


logger = logging.getLogger(__name__)

# By it a later push knows which commit was the last of ours, and so what others have changed since.
MARK = "convllava push"
_TOKEN_VARIABLES = ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN")
_COMMIT = re.compile(r"[0-9a-f]{40}")
_BYTES = 1 << 20


@dataclass(frozen=True)
class Target:
    """Where to: `kind` is `model` or `space`; `revision` a branch, made from main if it is not there."""

    repo_id: str
    kind: str = "model"
    revision: str = "main"
    create_pr: bool = False
    private: bool = False

    def __str__(self) -> str:
        place = self.repo_id if self.kind == "model" else f"{self.kind}s/{self.repo_id}"
        return place if self.revision == "main" else f"{place} ({self.revision})"


@dataclass
class Plan:
    """What a commit would do to a revision whose head is `head`."""

    head: str
    branch_exists: bool
    added: list[str] = field(default_factory=list)
    unchanged: list[str] = field(default_factory=list)
    removed: list[str] = field(default_factory=list)
    conflicts: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class Committed:
    """`url`: of the commit or the pull request; `None` if there was nothing to change."""

    plan: Plan
    url: str | None


@dataclass(frozen=True)
class _Remote:
    """A file on the Hub: the hash by which its content is known there, and its size in bytes."""

    hash: str
    size: int


def find_token(source: str | None = None, required: bool = True) -> str | None:
    """The token for the Hub: from the environment (`HF_TOKEN`), else the one that `hf auth login` saved.

    Args:
        source: `"environment"` or `"login"` to take it only from there.
        required: whether to raise where there is none, and not to return `None`.

    Raises:
        ConvLlavaError: there is none, or `source` is something else.
    """
    if source is None:
        token = get_token()
    elif source == "environment":
        token = next((os.environ[name].strip() for name in _TOKEN_VARIABLES if os.environ.get(name)), None)
    elif source == "login":
        path = Path(constants.HF_TOKEN_PATH)
        token = path.read_text(encoding="utf-8").strip() if path.is_file() else None
    else:
        # What was given may be a token itself, so it is not repeated.
        raise ConvLlavaError(
            "A token is taken from the environment or the login only, since a command line stays in the shell's "
            "history and in the list of processes. Say --token environment or --token login."
        )
    if not token and required:
        places = {"environment": "HF_TOKEN is not set", "login": "nobody has logged in"}
        reason = places.get(source or "", "HF_TOKEN is not set, and nobody has logged in")
        raise ConvLlavaError(
            f"There is no token for the Hub: {reason}. Run hf auth login, or set HF_TOKEN to one with write access."
        )
    return token or None


class Publisher:
    """The Hub, with a token."""

    def __init__(self, token: str):
        self.api = HfApi(token=token, library_name="convllava-hf")

    def check_access(self, target: Target) -> None:
        """Asks who the token's owner is and what the repository is like, before anything costs time.

        Raises:
            ConvLlavaError: the token is not valid or cannot write, or a repository that should be private is public.
        """
        try:
            who = self.api.whoami()
        except (HfHubHTTPError, *_transport_errors()) as error:
            # huggingface_hub 0.36 raises requests' own error here, which is a kind of OSError as a lost connection is.
            if _status(error) in (401, 403):
                raise ConvLlavaError(
                    "The Hub does not accept the token. Run hf auth login, or set HF_TOKEN to another."
                ) from error
            raise ConvLlavaError(f"The Hub at {self.api.endpoint} cannot be reached: {first_line(error)}") from error
        if ((who.get("auth") or {}).get("accessToken") or {}).get("role") == "read":
            raise ConvLlavaError(
                "The token can only read. Make one with write access at https://huggingface.co/settings/tokens."
            )
        try:
            info = self.api.repo_info(target.repo_id, repo_type=target.kind)
        except RepositoryNotFoundError:
            return
        except (HfHubHTTPError, *_transport_errors()) as error:
            raise ConvLlavaError(f"{target} cannot be looked at: {_reason(error)}") from error
        if target.private and not info.private:
            raise ConvLlavaError(
                f"{target.repo_id} exists and is public, so --private would publish to everybody. Make it private in "
                "its settings first, or choose another name."
            )

    def publish(
        self,
        target: Target,
        files: Mapping[str, Path | bytes],
        *,
        message: str,
        managed: Iterable[str] = (),
        force: bool = False,
    ) -> Committed:
        """Makes the files the repository's, in one commit.

        Args:
            files: path in the repository -> file here, or content.
            message: the commit's title, without the mark.
            managed: patterns of names; files of these names that are not among `files` are removed.
            force: overwrite what others have changed since the last push.

        Raises:
            ConvLlavaError: others have changed files; or the Hub failed, and then the repository is as it was.
        """
        try:
            self._create(target)
            plan = self._plan(target, files, tuple(managed))
        except (HfHubHTTPError, *_transport_errors()) as error:
            raise ConvLlavaError(f"Nothing was published to {target}: {_reason(error)}") from error
        if plan.conflicts and not force:
            raise ConvLlavaError(
                f"Nothing was published to {target}, since files there were changed by others than this command: "
                f"{', '.join(plan.conflicts)}. Look at them, take over what is worth it, and push with --force to "
                "overwrite them."
            )
        if not plan.added and not plan.removed and (plan.branch_exists or target.create_pr):
            return Committed(plan, None)
        return Committed(plan, self._commit(target, plan, files, message))

    def _create(self, target: Target) -> None:
        options: dict[str, Any] = {"space_sdk": "gradio"} if target.kind == "space" else {}
        self.api.create_repo(
            target.repo_id, repo_type=target.kind, private=target.private or None, exist_ok=True, **options
        )

    def _plan(self, target: Target, files: Mapping[str, Path | bytes], managed: tuple[str, ...]) -> Plan:
        try:
            head, branch_exists = self._head(target, target.revision), True
        except RevisionNotFoundError:
            head, branch_exists = self._head(target, "main"), False
        there = self._tree(target, head)
        before = self._last_push(target, head)
        plan = Plan(head, branch_exists)
        for name, content in sorted(files.items()):
            if name in there and _is_same(content, there[name]):
                plan.unchanged.append(name)
                continue
            plan.added.append(name)
            if there.get(name) != before.get(name):
                plan.conflicts.append(name if name in there else f"{name} (deleted there)")
        for name in sorted(set(there) - set(files)):
            if any(fnmatchcase(name, pattern) for pattern in managed):
                plan.removed.append(name)
                if there[name] != before.get(name):
                    plan.conflicts.append(f"{name} (to be removed)")
        if ".gitignore" in there:  # the Hub would leave out of the commit what it names
            plan.conflicts.append(".gitignore (by which the Hub may leave files out)")
        return plan

    def _head(self, target: Target, revision: str) -> str:
        return str(self.api.repo_info(target.repo_id, repo_type=target.kind, revision=revision).sha)

    def _tree(self, target: Target, commit: str) -> dict[str, _Remote]:
        entries = self.api.list_repo_tree(target.repo_id, repo_type=target.kind, revision=commit, recursive=True)
        return {
            entry.path: _Remote(entry.lfs.sha256 if entry.lfs else entry.blob_id, entry.size)
            for entry in entries
            if isinstance(entry, RepoFile)
        }

    def _last_push(self, target: Target, head: str) -> dict[str, _Remote]:
        """The files as our last commit before `head` left them; none if there is no such commit."""
        for commit in self.api.list_repo_commits(target.repo_id, repo_type=target.kind, revision=head):
            if MARK in commit.title:
                return self._tree(target, commit.commit_id)
        return {}

    def _commit(self, target: Target, plan: Plan, files: Mapping[str, Path | bytes], message: str) -> str:
        additions = [CommitOperationAdd(name, _content(files[name])) for name in plan.added]
        deletions = [CommitOperationDelete(name, is_folder=False) for name in plan.removed]
        place: dict[str, Any] = {"repo_id": target.repo_id, "repo_type": target.kind}
        branch_made = False
        try:
            # Large files first: they belong to nothing until a commit names them, and a repeated push finds them.
            start = target.revision if plan.branch_exists else None
            self.api.preupload_lfs_files(**place, additions=additions, revision=start, free_memory=False)
            if not plan.branch_exists:
                self.api.create_branch(**place, branch=target.revision, revision=plan.head)
                branch_made = True
            if not additions and not deletions:  # a new branch with what main has already
                return f"{self.api.endpoint}/{self._prefix(target)}{target.repo_id}/tree/{target.revision}"
            info = self.api.create_commit(
                **place,
                operations=[*additions, *deletions],
                commit_message=f"{message} ({MARK})",
                revision=target.revision,
                create_pr=target.create_pr,
                parent_commit=plan.head,  # refused if somebody was faster
            )
            self._check_commit(target, files, info.oid)
        except (HfHubHTTPError, RuntimeError, ValueError, *_transport_errors()) as error:
            if isinstance(error, ConvLlavaError):
                raise
            return self._after_failure(target, plan, files, error, branch_made)
        except KeyboardInterrupt:
            self._remove_branch(target, branch_made)
            raise
        return info.pr_url or info.commit_url

    def _after_failure(self, target, plan: Plan, files, error: Exception, branch_made: bool) -> str:
        """The commit's URL if it arrived after all, its answer being lost; else the error that says what is there."""
        try:
            head = self._head(target, target.revision)
            landed = not target.create_pr and head != plan.head and not self._differing(target, files, head)
        except (HfHubHTTPError, *_transport_errors()):
            raise ConvLlavaError(
                f"The upload to {target} failed: {_reason(error)}. It is not known whether the commit arrived, since "
                "the Hub does not answer; all of it is there or nothing. The same command again goes on from there."
            ) from error
        if landed:
            return f"{self.api.endpoint}/{self._prefix(target)}{target.repo_id}/commit/{head}"
        self._remove_branch(target, branch_made)
        if _status(error) == 412 or head != plan.head:
            raise ConvLlavaError(
                f"Nothing was published to {target}, since somebody else just committed to it. Run the command again."
            ) from error
        raise ConvLlavaError(
            f"Nothing was published to {target}, which is as it was: {_reason(error)}. The same command again goes on "
            "from there: large files that have arrived are not sent again."
        ) from error

    def _remove_branch(self, target: Target, branch_made: bool) -> None:
        if not branch_made:
            return
        try:
            self.api.delete_branch(target.repo_id, repo_type=target.kind, branch=target.revision)
        except (HfHubHTTPError, *_transport_errors()) as error:
            logger.warning("The new branch %s, a copy of main, is left: %s", target.revision, first_line(error))

    def _check_commit(self, target: Target, files: Mapping[str, Path | bytes], commit: str) -> None:
        if lacking := self._differing(target, files, commit):
            raise ConvLlavaError(
                f"{target} has a new commit {commit[:8]}, but the Hub left out or changed {', '.join(lacking)}. "
                "Revert it on its page, and report this."
            )

    def _differing(self, target: Target, files: Mapping[str, Path | bytes], commit: str) -> list[str]:
        there = self._tree(target, commit)
        return [name for name in files if name not in there or not _is_same(files[name], there[name])]

    @staticmethod
    def _prefix(target: Target) -> str:
        return "" if target.kind == "model" else f"{target.kind}s/"


def check_target(target: Target) -> None:
    """Refuses what the Hub would refuse later.

    Raises:
        ConvLlavaError: see the messages.
    """
    if not is_repo_id(target.repo_id):
        raise ConvLlavaError(f"{target.repo_id!r} is no repository's id: expected owner/name.")
    if target.create_pr and target.revision != "main":
        raise ConvLlavaError("A pull request is made against main: leave out --create-pr or --revision.")
    if _COMMIT.fullmatch(target.revision):
        raise ConvLlavaError(f"The revision {target.revision} is a commit; expected the name of a branch.")


def _content(content: Path | bytes) -> str | bytes:
    return content if isinstance(content, bytes) else str(content)


def _is_same(content: Path | bytes, remote: _Remote) -> bool:
    """Whether a file is the one on the Hub: by git's hash, or by SHA-256 where the Hub keeps it as a large file."""
    size = len(content) if isinstance(content, bytes) else content.stat().st_size
    if size != remote.size:
        return False
    digest = hashlib.sha256() if len(remote.hash) == 64 else hashlib.sha1(b"blob %d\0" % size)
    if isinstance(content, bytes):
        digest.update(content)
    else:
        with open(content, "rb") as stream:
            while block := stream.read(_BYTES):
                digest.update(block)
    return digest.hexdigest() == remote.hash


def _transport_errors() -> tuple[type[Exception], ...]:
    """What a broken connection raises: requests' errors below huggingface_hub 1, those of an httpx above."""
    found: list[type[Exception]] = [OSError]
    for name, error in (("requests", "RequestException"), ("httpx", "HTTPError"), ("httpx2", "HTTPError")):
        if name in sys.modules:
            found.append(getattr(sys.modules[name], error))
    return tuple(found)


def _status(error: Exception) -> int | None:
    """The status that the Hub answered with, if it answered."""
    return getattr(getattr(error, "response", None), "status_code", None)


def _reason(error: BaseException) -> str:
    """The error and what caused it, in one line: huggingface_hub wraps a failed upload without saying why."""
    reasons = [first_line(error).rstrip(".")]
    cause = error.__cause__
    if isinstance(error, RuntimeError) and cause is not None:
        reasons.append(first_line(cause))
    return ": ".join(reasons)
