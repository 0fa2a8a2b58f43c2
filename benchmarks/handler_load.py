"""The handler for Inference Endpoints under load: many clients at once, good and bad requests, memory over time.

    python benchmarks/handler_load.py                  # the golden checkpoint, tiny
    python benchmarks/handler_load.py MODEL --requests 50 --clients 8 --rounds 5

MODEL is a folder with a checkpoint; handler.py is put beside a copy of it. A process of its own loads it the way the
inference toolkit does and answers HTTP on loopback, one thread a connection. Each round sends the requests anew, from
several clients at once: photographs, several images, chats, long images, and every fifth request is bad. Prints a
Markdown table of the rounds; the first one is warm-up. Ends with status 1 if a request was not answered as it should
be, or if memory after the last round is more than `--growth` MiB above that after the warm-up. The server has
MALLOC_MMAP_THRESHOLD_=65536, so that images and tensors leave no gaps in the heap: glibc's own choice (set the
variable to 0 for it) keeps and gives back tens of MiB by chance, which would hide a small leak.
"""

import argparse
import base64
import contextlib
import ctypes
import functools
import gc
import http.client
import io
import json
import os
import platform
import subprocess
import sys
import tempfile
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path


ROOT = Path(__file__).parents[1]
MIB = 2**20
QUESTION = "What number is on the sign?"
sys.path.append(str(ROOT / "tests"))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="?", type=Path, help="default: the golden checkpoint, converted")
    parser.add_argument("--requests", type=int, default=50, help="of a round (%(default)s)")
    parser.add_argument("--clients", type=int, default=8, help="at once (%(default)s)")
    parser.add_argument("--rounds", type=int, default=4, help="after the warm-up (%(default)s)")
    parser.add_argument("--max-new-tokens", type=int, default=16, help="of an answer (%(default)s)")
    parser.add_argument("--growth", type=float, default=4, help="MiB that memory may grow by (%(default)s)")
    parser.add_argument("--json", action="store_true", help="print one JSON object and no table")
    parser.add_argument("--serve", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.serve:
        return serve(arguments.serve)
    with tempfile.TemporaryDirectory(prefix="handler-load-") as folder:
        repository = make_repository(arguments.model, Path(folder))
        requests = make_requests(arguments.requests, arguments.max_new_tokens)
        with Server(repository) as server:
            rounds = [run_round(server, requests, arguments.clients) for _ in range(arguments.rounds + 1)]
            told = {"loaded": server.loaded, "package": server.package, "rounds": rounds}
    told["growth"] = rounds[-1]["memory"] - rounds[0]["memory"]
    return report(told, arguments)


def report(told: dict, arguments: argparse.Namespace) -> int:
    good = all(not found["wrong"] and found["answered"] == arguments.requests for found in told["rounds"])
    good = good and told["growth"] <= arguments.growth * MIB
    if arguments.json:
        print(json.dumps(told))
        return 0 if good else 1
    print(f"{platform.platform()}, {os.cpu_count()} cores, Python {platform.python_version()}\n")
    print("| round | answered | seconds | requests/s | median | slowest | memory after | peak so far |")
    print("|---|---:|---:|---:|---:|---:|---:|---:|")
    for number, found in enumerate(told["rounds"]):
        times = sorted(found["times"])
        print(
            f"| {number or 'warm-up'} | {found['answered']} | {found['seconds']:.1f} | "
            f"{found['answered'] / found['seconds']:.1f} | {times[len(times) // 2]:.2f} s | {times[-1]:.2f} s | "
            f"{found['memory'] / MIB:.0f} MiB | {found['peak'] / MIB:.0f} MiB |"
        )
    for wrong in [wrong for found in told["rounds"] for wrong in found["wrong"]][:5]:
        print(f"WRONG: {wrong}")
    print(f"\nMemory grew by {told['growth'] / MIB:.1f} MiB; {arguments.growth:g} are allowed.")
    return 0 if good else 1


# --- the clients


def run_round(server: "Server", requests: list[tuple[dict, int | None]], clients: int) -> dict:
    """All requests once, shared among the clients."""
    todo, found = list(enumerate(requests)), {"answered": 0, "wrong": [], "times": []}
    lock = threading.Lock()

    def client() -> None:
        while True:
            with lock:
                if not todo:
                    return
                number, (request, status) = todo.pop(0)
            start = time.perf_counter()
            try:
                answer = server.ask(request)
            except (OSError, http.client.HTTPException, ValueError) as error:
                answer = {"lost": str(error)}
            with lock:
                found["times"].append(time.perf_counter() - start)
                found["answered"] += "lost" not in answer
                if answer.get("status") != status or ("generated_text" in answer) is (status is not None):
                    found["wrong"].append(f"request {number}: {json.dumps(answer)[:300]}")

    start = time.perf_counter()
    threads = [threading.Thread(target=client) for _ in range(clients)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return {**found, "seconds": time.perf_counter() - start, **server.memory()}


def make_requests(number: int, max_new_tokens: int) -> list[tuple[dict, int | None]]:
    """Bodies, and the status of the error that each is to be answered with; `None` where an answer is expected."""
    bad = [
        ({"image": "file:///etc/passwd", "question": QUESTION}, 400),
        ({"image": "http://169.254.169.254/latest/meta-data/", "question": QUESTION}, 403),
        ({"image": "http://127.0.0.1/", "question": QUESTION}, 403),
        ({"image": photo(0)[: 4 * 500], "question": QUESTION}, 415),
        ({"image": gigantic(), "question": QUESTION}, 413),
        ({"image": base64.b64encode(b"no image, but a text").decode(), "question": QUESTION}, 415),
        ({"question": QUESTION}, 400),
        ([{"role": "user", "content": "word"}] * 300, 413),
    ]
    requests = []
    for index in range(number):
        if index % 5 == 4:
            inputs, status = bad[index // 5 % len(bad)]
        else:
            inputs, status = good(index), None
        requests.append(({"inputs": inputs, "parameters": {"max_new_tokens": max_new_tokens}}, status))
    return requests


def good(index: int):
    if index % 5 == 0:
        return {"image": photo(index), "question": QUESTION}
    if index % 5 == 1:
        return {"image": [photo(index), photo(index + 1)], "question": f"{QUESTION} <image>"}
    if index % 5 == 2:
        chat = [{"role": ("user", "assistant")[turn % 2], "content": f"{turn}"} for turn in range(10)]
        content = [{"type": "image_url", "image_url": {"url": f"data:image/jpeg;base64,{photo(index)}"}}]
        return [*chat, {"role": "user", "content": [*content, {"type": "text", "text": QUESTION}]}]
    return {"image": photo(index, (3000 + index, 500)), "question": QUESTION}


@functools.cache
def photo(seed: int, size: tuple[int, int] | None = None) -> str:
    """A JPEG in base64, of another size for every seed."""
    import numpy as np
    from PIL import Image

    width, height = size or (1000 + 37 * (seed % 20), 700 + 29 * (seed % 13))
    coarse = np.random.default_rng(seed).integers(0, 256, (24, 32, 3), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC).save(buffer, format="JPEG", quality=90)
    return base64.b64encode(buffer.getvalue()).decode()


@functools.cache
def gigantic() -> str:
    """A PNG of 200 megapixels."""
    from PIL import Image

    buffer = io.BytesIO()
    Image.new("1", (20_000, 10_000)).save(buffer, format="PNG")
    return base64.b64encode(buffer.getvalue()).decode()


# --- the server


class Server:
    """The process that serves the handler, as a context manager."""

    def __init__(self, repository: Path):
        self.repository = repository

    def __enter__(self) -> "Server":
        command = [sys.executable, __file__, "--serve", str(self.repository)]
        environment = {"MALLOC_MMAP_THRESHOLD_": "65536", **os.environ}
        if environment["MALLOC_MMAP_THRESHOLD_"] == "0":
            del environment["MALLOC_MMAP_THRESHOLD_"]
        environment["HF_MODULES_CACHE"] = str(self.repository.parent / "modules")
        self.process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment)
        line = self.process.stdout.readline()
        if not line:
            raise OSError(f"the server ended with {self.process.wait()} before it served; stderr says why")
        started = json.loads(line)
        self.port, self.loaded, self.package = started["port"], started["memory"], started["package"]
        return self

    def __exit__(self, *exception) -> None:
        self.process.terminate()
        self.process.wait(30)

    def ask(self, request: dict) -> dict:
        return self._exchange("POST", json.dumps(request))

    def memory(self) -> dict[str, int]:
        return self._exchange("GET", None)

    def _exchange(self, method: str, body: str | None) -> dict:
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=300)
        try:
            connection.request(method, "/", body, {"Content-Type": "application/json"})
            return json.loads(connection.getresponse().read())
        finally:
            connection.close()


def serve(repository: Path) -> int:
    """Serves until it is ended. The first line of output is JSON: `port`, `memory` when loaded, `package`."""
    from helpers.handler_loading import load_handler

    handler = load_handler(repository)

    class Endpoint(BaseHTTPRequestHandler):
        def do_POST(self):  # noqa: N802
            self.answer(handler(json.loads(self.rfile.read(int(self.headers["Content-Length"])))))

        def do_GET(self):  # noqa: N802
            self.answer(memory())

        def answer(self, content) -> None:
            body = json.dumps(content).encode()
            self.send_response(200)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *args):
            pass

    class Threads(ThreadingHTTPServer):
        request_queue_size = 64  # clients that come at once wait, and are not turned away

    server = Threads(("127.0.0.1", 0), Endpoint)
    started = {"port": server.server_port, "package": "convllava_hf" in sys.modules, **memory()}
    print(json.dumps(started), flush=True)
    server.serve_forever()
    return 0


def memory() -> dict[str, int]:
    """Bytes of this process: `memory` is resident once unused memory is given back, `peak` the most there ever was."""
    status = Path("/proc/self/status")
    if not status.exists():
        raise OSError("the memory of a process is read from /proc, which is Linux's")
    gc.collect()
    with contextlib.suppress(AttributeError):  # a C library other than glibc
        ctypes.CDLL(None).malloc_trim(0)
    lines = dict(line.split(":") for line in status.read_text().splitlines())
    return {name: int(lines[key].split()[0]) * 1024 for name, key in (("memory", "VmRSS"), ("peak", "VmHWM"))}


def make_repository(model: Path | None, folder: Path) -> Path:
    from helpers import handler_loading

    if model is None:
        from convllava_hf.convert import convert_checkpoint

        golden = ROOT / "tests" / "golden" / "checkpoint-stage3"
        model = convert_checkpoint(golden, folder / "converted", progress=False)
    return handler_loading.make_repository(model, folder / "repository")


if __name__ == "__main__":
    sys.exit(main())
