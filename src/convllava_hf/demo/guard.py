"""What of the web server strangers can reach, and how much they can send it.

Gradio's server offers more than this page needs: it fetches any URL that it is asked for, takes uploads of any number,
and has pages for developing. All of that is closed here, in one place, whatever the version of Gradio brings.
"""

import asyncio
import json
import os
import re
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
        stored_bytes: once the files under `folder` have as many, further uploads are refused until some are deleted.
    """

    def __init__(self, app, upload_bytes: int, stored_bytes: int, folder: str):
        self.app = app
        self.upload_bytes = upload_bytes
        self.stored_bytes = stored_bytes
        self.folder = Path(folder)

    async def __call__(self, scope, receive, send) -> None:
        if scope["type"] == "lifespan":
            await self.app(scope, receive, send)
            return
        if scope["type"] == "websocket":
            await send({"type": "websocket.close"})
            return
        refusal = await self._refusal(scope)
        if refusal is not None:
            await _answer(send, *refusal)
            return

        async def send_with_headers(message) -> None:
            if message["type"] == "http.response.start":
                message = {**message, "headers": [*message.get("headers", []), *_HEADERS]}
            await send(message)

        await self.app(scope, receive, send_with_headers)

    async def _refusal(self, scope) -> tuple[int, str] | None:
        """Status and message for a request that goes no further."""
        method, path = scope["method"], scope["path"].removeprefix(scope.get("root_path", ""))
        known = {"GET": _GET, "HEAD": _GET, "POST": _POST}.get(method)
        if known is None or not known.fullmatch(path):
            return 404, "There is nothing here."
        if method != "POST":
            return None
        length = dict(scope["headers"]).get(b"content-length", b"")
        if not length.isdigit():
            return 411, "The request does not say how long it is."
        if int(length) > self.upload_bytes + _FORM_BYTES:
            return 413, f"The file is too large: at most {self.upload_bytes // 2**20} MB are taken."
        if _UPLOAD.fullmatch(path):
            stored = await asyncio.to_thread(_bytes_under, self.folder)
            if stored + int(length) > self.stored_bytes:
                return 503, "The page holds as many pictures as it can. Try again in an hour."
        return None


def _bytes_under(folder: Path) -> int:
    total = 0
    for root, _, names in os.walk(folder):
        for name in names:
            try:
                total += os.stat(os.path.join(root, name)).st_size
            except FileNotFoundError:  # deleted meanwhile
                continue
    return total


async def _answer(send, status: int, message: str) -> None:
    body = json.dumps({"error": message, "detail": message}).encode()
    headers = [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode())]
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": body})
