"""What of the web server strangers can reach, and how much they can send it.

Gradio's server offers more than this page needs: it fetches any URL that it is asked for, takes uploads of any number,
and has pages for developing. All of that is closed here, in one place, for every version of Gradio.
"""

import asyncio
import json
import os
import re
import time
from dataclasses import dataclass
from pathlib import Path


# What a browser, gradio_client and curl use of Gradio. Everything else does not exist.
_GET = re.compile(
    r"/|/config/?|/(static|assets|svelte)/.*|/favicon\.ico|/theme\.css|/manifest\.json|/robots\.txt|/pwa_icon(/\d+)?"
    r"|/gradio_api/((theme\.css|app_id|user|login_check|token|info|startup-events|queue/data|upload_progress)/?"
    r"|heartbeat/\w+|file=(?!\w+:).*|call/\w+/\w+)"
)
_POST = re.compile(r"/gradio_api/((queue/join|upload|cancel|reset|run/predict|call/\w+)/?)")
_UPLOAD = re.compile(r"/gradio_api/upload/?")
_FORM_BYTES = 2**16  # what a form says round a file
_FILES_IN_UPLOAD = 4  # the page sends one
_BLOCK = 4096  # bytes that even an empty file takes on the disk, and its folder too

# The page's own scripts and styles are inline and are compiled from strings; nothing comes from or goes elsewhere.
_CONTENT_SECURITY_POLICY = (
    "default-src 'self' 'unsafe-inline' 'unsafe-eval' data: blob:; connect-src 'self' data: blob:; object-src 'none'; "
    "form-action 'self'; base-uri 'self'"
)
_HEADERS = [
    (b"content-security-policy", _CONTENT_SECURITY_POLICY.encode()),
    (b"referrer-policy", b"same-origin"),
    (b"x-content-type-options", b"nosniff"),
]


class Guard:
    """ASGI middleware round Gradio's application.

    Args:
        upload_bytes: of one request.
        stored_bytes: what the files under `folder` may take on the disk together, those that are still arriving
            included; further uploads are refused until some are deleted.
        stored_files: how many there may be.
        stored_seconds: parts of uploads that were broken off are deleted after that time.
    """

    def __init__(self, app, upload_bytes: int, stored_bytes: int, stored_files: int, stored_seconds: int, folder: str):
        self.app = app
        self.upload_bytes = upload_bytes
        self.stored_bytes = stored_bytes
        self.stored_files = stored_files
        self.stored_seconds = stored_seconds
        self.folder = Path(folder)
        self._reserved = _Stored(0, 0)  # for uploads that are arriving
        self._lock = asyncio.Lock()

    async def __call__(self, scope, receive, send) -> None:
        if scope["type"] == "lifespan":
            await self.app(scope, receive, send)
            return
        if scope["type"] == "websocket":
            await send({"type": "websocket.close"})
            return
        refusal = self._refusal(scope)
        if refusal is not None:
            await _answer(send, *refusal)
            return

        async def send_with_headers(message) -> None:
            if message["type"] == "http.response.start":
                message = {**message, "headers": [*message.get("headers", []), *_HEADERS]}
            await send(message)

        if scope["method"] == "POST" and _UPLOAD.fullmatch(_path(scope)):
            await self._take_upload(scope, receive, send_with_headers)
        else:
            await self.app(scope, receive, send_with_headers)

    def _refusal(self, scope) -> tuple[int, str] | None:
        """Status and message for a request that goes no further."""
        method = scope["method"]
        known = {"GET": _GET, "HEAD": _GET, "POST": _POST}.get(method)
        if known is None or not known.fullmatch(_path(scope)):
            return 404, "There is nothing here."
        if method != "POST":
            return None
        length = _length(scope)
        if length is None:
            return 411, "The request does not say how long it is."
        if length > self.upload_bytes + _FORM_BYTES:
            return 413, f"The file is too large: at most {self.upload_bytes // 2**20} MB are taken."
        return None

    async def _take_upload(self, scope, receive, send) -> None:
        """Hands an upload on if there is room for all that it may leave; it is reserved until the files are there."""
        wanted = _Stored(_on_disk(_length(scope) or 0) + 2 * _FILES_IN_UPLOAD * _BLOCK, _FILES_IN_UPLOAD)
        async with self._lock:
            stored = await asyncio.to_thread(_stored_under, self.folder, self.stored_seconds)
            total = stored + self._reserved + wanted
            has_room = total.bytes <= self.stored_bytes and total.files <= self.stored_files
            if has_room:
                self._reserved += wanted
        if not has_room:
            await _answer(send, 503, "The page holds as many images as it can. Try again in an hour.")
            return
        upload = _Upload(scope, receive)
        try:

            async def send_if_whole(message) -> None:
                if not upload.cut:
                    await send(message)

            await self.app(scope, upload.receive, send_if_whole)
            if upload.cut:
                await _answer(send, 413, f"The request holds too many files: at most {_FILES_IN_UPLOAD} are taken.")
        finally:
            self._reserved -= wanted


class _Upload:
    """The body of an upload, which ends after so many files as one request may hold.

    Many files of a few bytes in one small request would take far more room on the disk than the request is long.
    """

    def __init__(self, scope, receive):
        self.cut = False  # whether more files followed
        self._receive = receive
        content_type = dict(scope["headers"]).get(b"content-type", b"")
        match = re.search(rb'boundary="?([^";]+)', content_type, re.IGNORECASE)
        self._delimiter = b"--" + match[1].strip() if match else None
        self._found = 0
        self._ended = False
        self._carried = b""  # the end of what was handed on, in which a delimiter may have begun

    async def receive(self) -> dict:
        message = await self._receive()
        if message["type"] != "http.request" or self._delimiter is None or self._ended:
            return message
        body = self._carried + message.get("body", b"")
        start = 0
        while (place := body.find(self._delimiter, start)) >= 0:
            start = place + len(self._delimiter)
            self._found += 1
            if self._found > _FILES_IN_UPLOAD:  # the body ends here
                self._ended = True
                rest = body[start:]
                while len(rest) < 2 and message.get("more_body"):
                    message = await self._receive()
                    rest += message.get("body", b"")
                self.cut = rest[:2] != b"--"
                ending = body[len(self._carried) : start] + b"--\r\n"
                return {"type": "http.request", "body": ending, "more_body": False}
        fresh = body[len(self._carried) :]
        self._carried = body[start:][-(len(self._delimiter) - 1) :]
        return {**message, "body": fresh}


@dataclass(frozen=True)
class _Stored:
    """What files take on the disk, in bytes, and how many they are."""

    bytes: int
    files: int

    def __add__(self, other: "_Stored") -> "_Stored":
        return _Stored(self.bytes + other.bytes, self.files + other.files)

    def __sub__(self, other: "_Stored") -> "_Stored":
        return _Stored(self.bytes - other.bytes, self.files - other.files)


def _path(scope) -> str:
    return scope["path"].removeprefix(scope.get("root_path", ""))


def _length(scope) -> int | None:
    length = dict(scope["headers"]).get(b"content-length", b"")
    return int(length) if re.fullmatch(rb"[0-9]{1,18}", length) else None


def _stored_under(folder: Path, seconds: int) -> _Stored:
    """What lies in a folder. Files directly in it are parts of uploads: old ones were broken off, and are deleted."""
    total, files = 0, 0
    for root, _, names in os.walk(folder):
        for name in (".", *names):
            path = os.path.join(root, name)
            try:
                about = os.stat(path, follow_symlinks=False)
                if name != "." and Path(root) == folder and time.time() - about.st_mtime > seconds:
                    os.unlink(path)
                    continue
            except FileNotFoundError:  # deleted since
                continue
            # Not every file system knows at once how many blocks a new file takes.
            total += max(_on_disk(about.st_size), 512 * getattr(about, "st_blocks", 0))
            files += 1
    return _Stored(total, files)


def _on_disk(size: int) -> int:
    return max(1, -(-size // _BLOCK)) * _BLOCK


async def _answer(send, status: int, message: str) -> None:
    body = json.dumps({"error": message, "detail": message}).encode()
    headers = [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode())]
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": body})
