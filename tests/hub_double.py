"""A stand-in for the Hub on loopback: as much of its protocol as pushing and loading models needs."""

import base64
import contextlib
import hashlib
import json
import re
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import unquote, urlsplit


class Hub:
    """Model repositories in memory, each with its branches and the files of every commit."""

    def __init__(self):
        self.url = ""
        self.lock = threading.Lock()
        self.commits: dict[str, dict[str, dict[str, bytes]]] = {}  # repository -> commit -> path -> content
        self.branches: dict[str, dict[str, str]] = {}  # repository -> branch -> commit

    def create(self, repository: str) -> None:
        self.branches[repository] = {}
        self.commits[repository] = {}
        self.commit(repository, "main", {}, [])

    def commit(self, repository: str, branch: str, added: dict[str, bytes], deleted: list[str]) -> str:
        parent = self.branches[repository].get(branch)
        files = {**self.commits[repository].get(parent, {}), **added}
        files = {path: content for path, content in files.items() if path not in deleted}
        sha = hashlib.sha1(repr((parent, sorted(files.items()))).encode()).hexdigest()
        self.commits[repository][sha] = files
        self.branches[repository][branch] = sha
        return sha

    def files(self, repository: str, revision: str = "main") -> dict[str, bytes]:
        """What a revision holds: path -> content."""
        return self.commits[repository][self.branches[repository].get(revision, revision)]


class _NotFound(Exception):
    """Told to the client with the code that huggingface_hub turns into its own exception."""


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

    def do_HEAD(self) -> None:
        self.answer()

    def do_POST(self) -> None:
        self.answer()

    def answer(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        path = unquote(urlsplit(self.path).path)
        try:
            with self.hub.lock:
                for method, pattern, action in _ROUTES:
                    if method == self.command.replace("HEAD", "GET") and (match := re.fullmatch(pattern, path)):
                        return action(self, body, **match.groupdict())
            self.reply(404, {"error": f"The double of the Hub does not know {self.command} {path}"})
        except _NotFound as missing:
            self.reply(404, {"error": str(missing)}, X_Error_Code=str(missing))

    def revision(self, repo: str, revision: str) -> tuple[str, dict[str, bytes]]:
        """Commit and files of a branch or commit."""
        if repo not in self.hub.commits:
            raise _NotFound("RepoNotFound")
        sha = self.hub.branches[repo].get(revision, revision)
        if sha not in self.hub.commits[repo]:
            raise _NotFound("RevisionNotFound")
        return sha, self.hub.commits[repo][sha]

    def whoami(self, body: bytes) -> None:
        self.reply(body={"name": "user", "type": "user", "orgs": [], "auth": {"accessToken": {"role": "write"}}})

    def create(self, body: bytes) -> None:
        wanted = json.loads(body)
        repo = f"{wanted.get('organization') or 'user'}/{wanted['name']}"
        known = repo in self.hub.commits
        if not known:
            self.hub.create(repo)
        self.reply(409 if known else 200, {"url": f"{self.hub.url}/{repo}", "id": repo, "name": repo})

    def branch(self, body: bytes, repo: str, revision: str) -> None:
        known = revision in self.hub.branches[repo]
        if not known:
            start = (json.loads(body) if body else {}).get("startingPoint", "main")
            self.hub.branches[repo][revision] = self.revision(repo, start)[0]
        self.reply(409 if known else 200, {})

    def validate(self, body: bytes) -> None:
        self.reply(body={"errors": [], "warnings": []})

    def preupload(self, body: bytes, repo: str, revision: str) -> None:
        files = self.revision(repo, revision)[1]
        told = [
            {
                "path": file["path"],
                "uploadMode": "regular",
                "shouldIgnore": False,
                "oid": _oid(files[file["path"]]) if file["path"] in files else None,
            }
            for file in json.loads(body)["files"]
        ]
        self.reply(body={"files": told})

    def commit(self, body: bytes, repo: str, revision: str) -> None:
        lines = [json.loads(line) for line in body.splitlines() if line.strip()]
        added = {
            line["value"]["path"]: base64.b64decode(line["value"]["content"])
            for line in lines
            if line["key"] == "file"
        }
        deleted = [line["value"]["path"] for line in lines if line["key"] == "deletedFile"]
        sha = self.hub.commit(repo, revision, added, deleted)
        self.reply(body={"success": True, "commitOid": sha, "commitUrl": f"{self.hub.url}/{repo}/commit/{sha}"})

    def info(self, body: bytes, repo: str, revision: str = "main") -> None:
        sha, files = self.revision(repo, revision)
        siblings = [{"rfilename": path, "size": len(files[path]), "blobId": _oid(files[path])} for path in files]
        self.reply(body={"id": repo, "modelId": repo, "sha": sha, "private": False, "tags": [], "siblings": siblings})

    def tree(self, body: bytes, repo: str, revision: str, folder: str | None = None) -> None:
        files = self.revision(repo, revision)[1]
        inside = {path: content for path, content in files.items() if not folder or path.startswith(f"{folder}/")}
        if folder and not inside:
            raise _NotFound("EntryNotFound")
        entries = [
            {"type": "file", "path": path, "size": len(content), "oid": _oid(content)}
            for path, content in inside.items()
        ]
        self.reply(body=entries)

    def refs(self, body: bytes, repo: str) -> None:
        branches = [
            {"name": name, "ref": f"refs/heads/{name}", "targetCommit": sha}
            for name, sha in self.hub.branches[repo].items()
        ]
        self.reply(body={"branches": branches, "tags": [], "converts": [], "pullRequests": []})

    def resolve(self, body: bytes, repo: str, revision: str, file: str) -> None:
        sha, files = self.revision(repo, revision)
        if file not in files:
            raise _NotFound("EntryNotFound")
        self.reply(body=files[file], X_Repo_Commit=sha, ETag=f'"{_oid(files[file])}"')


def _oid(content: bytes) -> str:
    """What git calls a file of this content."""
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


_REPO = r"(?P<repo>[^/]+/[^/]+)"
_REVISION = r"(?P<revision>[^/]+)"
_ROUTES = [
    ("GET", "/api/whoami-v2", _Handler.whoami),
    ("POST", "/api/repos/create", _Handler.create),
    ("POST", "/api/validate-yaml", _Handler.validate),
    ("POST", f"/api/models/{_REPO}/branch/{_REVISION}", _Handler.branch),
    ("POST", f"/api/models/{_REPO}/preupload/{_REVISION}", _Handler.preupload),
    ("POST", f"/api/models/{_REPO}/commit/{_REVISION}", _Handler.commit),
    ("GET", f"/api/models/{_REPO}", _Handler.info),
    ("GET", f"/api/models/{_REPO}/revision/{_REVISION}", _Handler.info),
    ("GET", f"/api/models/{_REPO}/tree/{_REVISION}(?:/(?P<folder>.+))?", _Handler.tree),
    ("GET", f"/api/models/{_REPO}/refs", _Handler.refs),
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
