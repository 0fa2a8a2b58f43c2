"""A stand-in for the Hub on loopback: as much of its protocol as pushing and loading models needs."""

import base64
import contextlib
import hashlib
import json
import re
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import parse_qs, unquote, urlsplit


class Hub:
    """Repositories in memory, each with its branches and the files of every commit.

    A Space is called `spaces/owner/name`. Tokens are taken for what they are: none or `hf_invalid` is refused,
    `hf_reader` can only read, every other can write.

    `fault`: called with method and path of each request; what it returns happens instead: a status, `"drop"` to end
    the connection, or `"lose"` to do what was asked and end the connection without an answer.
    """

    def __init__(self):
        self.url = ""
        self.lock = threading.RLock()
        self.commits: dict[str, dict[str, dict[str, bytes]]] = {}  # repository -> commit -> path -> content
        self.branches: dict[str, dict[str, str]] = {}  # repository -> branch -> commit
        self.history: dict[str, dict[str, tuple[str | None, str]]] = {}  # repository -> commit -> parent, title
        self.private: set[str] = set()
        self.objects: dict[str, bytes] = {}  # large files by SHA-256, whether or not a commit names them
        self.uploads: list[str] = []  # large files in the order in which they arrived
        self.pull_requests: dict[str, int] = {}
        self.fault: Callable[[str, str], int | str | None] = lambda method, path: None

    def create(self, repository: str, private: bool = False) -> None:
        self.branches[repository] = {}
        self.commits[repository] = {}
        self.history[repository] = {}
        if private:
            self.private.add(repository)
        self.commit(repository, "main", {}, [], title="initial commit")

    def commit(
        self, repository: str, branch: str, added: dict[str, bytes], deleted: list[str], title: str = "Change files"
    ) -> str:
        parent = self.branches[repository].get(branch)
        files = {**self.commits[repository].get(parent, {}), **added}
        files = {path: content for path, content in files.items() if path not in deleted}
        sha = hashlib.sha1(repr((parent, title, sorted(files.items()))).encode()).hexdigest()
        self.commits[repository][sha] = files
        self.branches[repository][branch] = sha
        self.history[repository][sha] = (parent, title)
        return sha

    def files(self, repository: str, revision: str = "main") -> dict[str, bytes]:
        """What a revision holds: path -> content."""
        return self.commits[repository][self.branches[repository].get(revision, revision)]

    def titles(self, repository: str, revision: str = "main") -> list[str]:
        """The titles of a branch's commits, the newest first."""
        return [self.history[repository][sha][1] for sha in self.line(repository, revision)]

    def line(self, repository: str, revision: str) -> Iterator[str]:
        """A revision's commits, the newest first."""
        sha: str | None = self.branches[repository].get(revision, revision)
        while sha is not None:
            yield sha
            sha = self.history[repository][sha][0]


class _Refused(Exception):
    """Told to the client with a status, and the code that huggingface_hub turns into its own exception."""

    def __init__(self, code: str, status: int = 404):
        super().__init__(code)
        self.status = status


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    hub: Hub

    def log_message(self, *args) -> None:
        """Silent."""

    def reply(self, status: int = 200, body: bytes | list | dict = b"", **headers: str) -> None:
        if not isinstance(body, bytes):
            body = json.dumps(body).encode()
            headers["Content-Type"] = "application/json"
        self.send_response(status)
        headers.setdefault("Content-Length", str(len(body)))
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def do_GET(self) -> None:
        self.answer()

    do_HEAD = do_POST = do_PUT = do_DELETE = do_GET

    def answer(self) -> None:
        parts = urlsplit(self.path)
        path, self.query = unquote(parts.path), parse_qs(parts.query)
        fault = self.hub.fault(self.command, path)
        if fault == "drop":  # before the body is read, as when a cable is pulled
            self.close_connection = True
            return
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        if isinstance(fault, int):
            self.reply(fault, {"error": "The double was told to fail"})
            return
        if fault == "lose":
            self.reply = lambda *args, **kwargs: None
            self.close_connection = True
        try:
            with self.hub.lock:
                for method, pattern, action in _ROUTES:
                    if method == self.command.replace("HEAD", "GET") and (match := re.fullmatch(pattern, path)):
                        return action(self, body, **_named(match))
            self.reply(404, {"error": f"The double of the Hub does not know {self.command} {path}"})
        except _Refused as refused:
            self.reply(refused.status, {"error": str(refused)}, X_Error_Code=str(refused))

    @property
    def token(self) -> str:
        return (self.headers.get("Authorization") or "").removeprefix("Bearer ")

    def check_write(self) -> None:
        if self.token in ("", "hf_invalid"):
            raise _Refused("Unauthorized", 401)
        if self.token == "hf_reader":
            raise _Refused("Forbidden", 403)

    def revision(self, repo: str, revision: str) -> tuple[str, dict[str, bytes]]:
        """Commit and files of a branch or commit."""
        if repo not in self.hub.commits or (repo in self.hub.private and self.token in ("", "hf_invalid")):
            raise _Refused("RepoNotFound")
        sha = self.hub.branches[repo].get(revision, revision)
        if sha not in self.hub.commits[repo]:
            raise _Refused("RevisionNotFound")
        return sha, self.hub.commits[repo][sha]

    def whoami(self, body: bytes) -> None:
        if self.token in ("", "hf_invalid"):
            raise _Refused("Unauthorized", 401)
        role = "read" if self.token == "hf_reader" else "write"
        self.reply(body={"name": "user", "type": "user", "orgs": [], "auth": {"accessToken": {"role": role}}})

    def create(self, body: bytes) -> None:
        self.check_write()
        wanted = json.loads(body)
        name = f"{wanted.get('organization') or 'user'}/{wanted['name']}"
        repo = f"spaces/{name}" if wanted.get("type") == "space" else name
        known = repo in self.hub.commits
        if not known:
            private = bool(wanted.get("private")) or wanted.get("visibility") == "private"
            self.hub.create(repo, private=private)
        self.reply(409 if known else 200, {"url": f"{self.hub.url}/{repo}", "id": name, "name": name})

    def branch(self, body: bytes, repo: str, revision: str) -> None:
        self.check_write()
        known = revision in self.hub.branches[repo]
        if not known:
            start = (json.loads(body) if body else {}).get("startingPoint", "main")
            self.hub.branches[repo][revision] = self.revision(repo, start)[0]
        self.reply(409 if known else 200, {})

    def delete_branch(self, body: bytes, repo: str, revision: str) -> None:
        self.check_write()
        if self.hub.branches[repo].pop(revision, None) is None:
            raise _Refused("RevisionNotFound")
        self.reply()

    def validate(self, body: bytes) -> None:
        self.reply(body={"errors": [], "warnings": []})

    def preupload(self, body: bytes, repo: str, revision: str) -> None:
        self.check_write()
        files = self.revision(repo, revision)[1]
        told = [
            {
                "path": file["path"],
                "uploadMode": "lfs" if _is_large(file["path"]) else "regular",
                "shouldIgnore": False,
                "oid": _hash(file["path"], files[file["path"]]) if file["path"] in files else None,
            }
            for file in json.loads(body)["files"]
        ]
        self.reply(body={"files": told})

    def batch(self, body: bytes, repo: str) -> None:
        """git-LFS: where to upload what is not there yet."""
        self.check_write()
        objects = []
        for wanted in json.loads(body)["objects"]:
            told = {"oid": wanted["oid"], "size": wanted["size"]}
            if wanted["oid"] not in self.hub.objects:
                told["actions"] = {"upload": {"href": f"{self.hub.url}/lfs/{wanted['oid']}", "header": {}}}
            objects.append(told)
        self.reply(body={"transfer": "basic", "objects": objects})

    def upload(self, body: bytes, oid: str) -> None:
        if hashlib.sha256(body).hexdigest() != oid:
            return self.reply(400, {"error": "The content has another SHA-256"})
        self.hub.objects[oid] = body
        self.hub.uploads.append(oid)
        self.reply()

    def commit(self, body: bytes, repo: str, revision: str) -> None:
        self.check_write()
        lines = [json.loads(line) for line in body.splitlines() if line.strip()]
        header = next(line["value"] for line in lines if line["key"] == "header")
        head, files = self.revision(repo, revision)
        if header.get("parentCommit") not in (None, head):
            raise _Refused("PreconditionFailed", 412)
        added = {}
        for line in lines:
            value = line["value"]
            if line["key"] == "file":
                added[value["path"]] = base64.b64decode(value["content"])
            elif line["key"] == "lfsFile":
                if value["oid"] not in self.hub.objects:
                    raise _Refused("LfsObjectNotFound", 400)
                added[value["path"]] = self.hub.objects[value["oid"]]
        deleted = [line["value"]["path"] for line in lines if line["key"] == "deletedFile"]
        if missing := [path for path in deleted if path not in files]:
            return self.reply(404, {"error": f"A file with this name doesn't exist: {missing}"})
        told = {}
        if "create_pr" in self.query:
            number = self.hub.pull_requests[repo] = self.hub.pull_requests.get(repo, 0) + 1
            revision = f"refs/pr/{number}"
            self.hub.branches[repo][revision] = head
            told["pullRequestUrl"] = f"{self.hub.url}/{repo}/discussions/{number}"
        sha = self.hub.commit(repo, revision, added, deleted, title=header["summary"])
        told |= {"success": True, "commitOid": sha, "commitUrl": f"{self.hub.url}/{repo}/commit/{sha}"}
        self.reply(body=told)

    def log(self, body: bytes, repo: str, revision: str) -> None:
        """The commits of a revision, the newest first."""
        told = []
        for sha in self.hub.line(repo, self.revision(repo, revision)[0]):
            title = self.hub.history[repo][sha][1]
            told.append({"id": sha, "title": title, "message": "", "date": _DATE, "authors": [{"user": "user"}]})
        self.reply(body=told)

    def info(self, body: bytes, repo: str, revision: str = "main") -> None:
        sha, files = self.revision(repo, revision)
        siblings = [{"rfilename": path, "size": len(files[path]), "blobId": _oid(files[path])} for path in files]
        told = {"id": repo.removeprefix("spaces/"), "sha": sha, "private": repo in self.hub.private, "tags": []}
        self.reply(body={**told, "modelId": told["id"], "siblings": siblings})

    def tree(self, body: bytes, repo: str, revision: str, folder: str | None = None) -> None:
        files = self.revision(repo, revision)[1]
        inside = {path: content for path, content in files.items() if not folder or path.startswith(f"{folder}/")}
        if folder and not inside:
            raise _Refused("EntryNotFound")
        self.reply(body=[_entry(path, content) for path, content in inside.items()])

    def refs(self, body: bytes, repo: str) -> None:
        branches = [
            {"name": name, "ref": f"refs/heads/{name}", "targetCommit": sha}
            for name, sha in self.hub.branches[repo].items()
        ]
        self.reply(body={"branches": branches, "tags": [], "converts": [], "pullRequests": []})

    def resolve(self, body: bytes, repo: str, revision: str, file: str) -> None:
        sha, files = self.revision(repo, revision)
        if file not in files:
            raise _Refused("EntryNotFound")
        self.reply(body=files[file], X_Repo_Commit=sha, ETag=f'"{_hash(file, files[file])}"')


def _named(match: re.Match) -> dict[str, str]:
    """The groups of a route, with the kind of repository in its name."""
    groups = {name: value for name, value in match.groupdict().items() if value is not None}
    if groups.pop("kind", "") == "spaces":
        groups["repo"] = f"spaces/{groups['repo']}"
    return groups


def _is_large(path: str) -> bool:
    """Whether the Hub keeps it with git-LFS, by its default .gitattributes."""
    return path.endswith(".safetensors")


def _oid(content: bytes) -> str:
    """What git calls a file of this content."""
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


def _hash(path: str, content: bytes) -> str:
    return hashlib.sha256(content).hexdigest() if _is_large(path) else _oid(content)


def _entry(path: str, content: bytes) -> dict:
    """A file in a folder's listing; of a large one git itself knows a pointer."""
    if not _is_large(path):
        return {"type": "file", "path": path, "size": len(content), "oid": _oid(content)}
    digest = hashlib.sha256(content).hexdigest()
    pointer = f"version https://git-lfs.github.com/spec/v1\noid sha256:{digest}\nsize {len(content)}\n".encode()
    lfs = {"oid": digest, "size": len(content), "pointerSize": len(pointer)}
    return {"type": "file", "path": path, "size": len(content), "oid": _oid(pointer), "lfs": lfs}


_DATE = "2026-01-01T00:00:00.000Z"
_API = r"/api/(?P<kind>models|spaces)/(?P<repo>[^/]+/[^/]+)"
_REPO = r"(?:(?P<kind>spaces)/)?(?P<repo>[^/]+/[^/]+?)"
_REVISION = r"(?P<revision>refs/pr/\d+|[^/]+)"
_ROUTES = [
    ("GET", "/api/whoami-v2", _Handler.whoami),
    ("POST", "/api/repos/create", _Handler.create),
    ("POST", "/api/validate-yaml", _Handler.validate),
    ("POST", f"{_API}/branch/{_REVISION}", _Handler.branch),
    ("DELETE", f"{_API}/branch/{_REVISION}", _Handler.delete_branch),
    ("POST", f"{_API}/preupload/{_REVISION}", _Handler.preupload),
    ("POST", f"{_API}/commit/{_REVISION}", _Handler.commit),
    ("GET", f"{_API}/commits/{_REVISION}", _Handler.log),
    ("GET", _API, _Handler.info),
    ("GET", f"{_API}/revision/{_REVISION}", _Handler.info),
    ("GET", f"{_API}/tree/{_REVISION}(?:/(?P<folder>.+))?", _Handler.tree),
    ("GET", f"{_API}/refs", _Handler.refs),
    ("POST", rf"/{_REPO}\.git/info/lfs/objects/batch", _Handler.batch),
    ("PUT", "/lfs/(?P<oid>[0-9a-f]{64})", _Handler.upload),
    ("GET", f"/{_REPO}/resolve/{_REVISION}/(?P<file>.+)", _Handler.resolve),
]


@contextlib.contextmanager
def serve_hub() -> Iterator[Hub]:
    """A Hub on a free port of loopback; `.url` is what HF_ENDPOINT must be before huggingface_hub is imported."""
    hub = Hub()
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (_Handler,), {"hub": hub}))
    hub.url = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
