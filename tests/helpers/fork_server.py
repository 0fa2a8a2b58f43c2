"""Python processes in milliseconds: forked from one that has imported torch and transformers, and nothing of ours.

`import transformers` with all that a model needs takes six seconds and more, and most commands of the tests do little
else. `start` and `run` take the place of `subprocess.Popen` and `subprocess.run` for commands that begin with this
interpreter. What a forked process sees is what a fresh one would: its own `__main__`, arguments, working directory,
environment, standard streams and signal handlers, and neither convllava_hf nor a model's code among its modules.

huggingface_hub and transformers read the folders of their caches from the environment when they are imported. In the
server these are paths below /proc/self/fd, and each forked process opens its own folders there. A command that needs
what only a new Python can have, such as another hash seed or encoding, gets one.
"""

import contextlib
import gc
import importlib.util
import json
import os
import random
import re
import runpy
import selectors
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
import types
from collections.abc import Mapping, Sequence
from pathlib import Path


PRELOADED = (
    "torch",
    "torch.distributed.fsdp",
    "transformers.modeling_utils",
    "transformers.generation",
    "transformers.models.auto.modeling_auto",
    "transformers.models.auto.processing_auto",
    "transformers.models.convnext.modeling_convnext",
    "transformers.models.llama.modeling_llama",
    "transformers.trainer",
    "accelerate",
    "datasets",
    "peft",
    "trl",
    "trl.trainer.sft_trainer",
)
AVAILABLE = sys.platform == "linux" and not os.environ.get("CONVLLAVA_TESTS_FRESH_PROCESSES")
_FOLDERS = {"HF_HOME": 240, "HF_MODULES_CACHE": 241}  # the descriptors that lead to them


# --- in the tests


class ForkedProcess:
    """As much of `subprocess.Popen` as the tests use; output that is piped is text."""

    def __init__(self, server: "ForkServer", request: dict, streams: Mapping[str, object]):
        self.args, self.returncode = request["argv"], None
        pipes, ends = {}, []
        for name, stream in streams.items():
            if stream == subprocess.PIPE:
                read, write = os.pipe()
                ours, theirs = (write, read) if name == "stdin" else (read, write)
                pipes[name] = open(ours, "w" if name == "stdin" else "r", encoding="utf-8", errors="replace")
                ends.append(theirs)
            elif stream == subprocess.STDOUT:
                ends.append(os.dup(ends[1]))
            elif stream in (None, subprocess.DEVNULL):
                ends.append(os.open(os.devnull, os.O_RDWR))
            else:
                ends.append(os.dup(stream if isinstance(stream, int) else stream.fileno()))
        self.stdin, self.stdout, self.stderr = (pipes.get(name) for name in ("stdin", "stdout", "stderr"))
        self._connection, self._said = server.connect(), b""
        try:
            socket.send_fds(self._connection, [b" "], ends)
            self._connection.sendall(json.dumps(request).encode() + b"\n")
        finally:
            for end in ends:
                os.close(end)
        self.pid = self._number(None)

    def _number(self, timeout: float | None) -> int:
        """The server's next word: first the process's id, then its exit code."""
        self._connection.settimeout(timeout)
        while b"\n" not in self._said:
            self._said += (got := self._connection.recv(64))
            assert got, "the fork server has ended"
        line, _, self._said = self._said.partition(b"\n")
        return int(line)

    def poll(self) -> int | None:
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.wait(timeout=0)
        return self.returncode

    def wait(self, timeout: float | None = None) -> int:
        if self.returncode is None:
            try:
                self.returncode = self._number(timeout)
            except (TimeoutError, BlockingIOError):
                raise subprocess.TimeoutExpired(self.args, timeout) from None
            self._connection.close()
        return self.returncode

    def communicate(self, input: str | None = None, timeout: float | None = None) -> tuple[str | None, str | None]:
        """Both streams to their ends, then the exit code; the process is killed when the time is over."""
        if self.stdin:
            with contextlib.suppress(BrokenPipeError), self.stdin:
                self.stdin.write(input or "")
        end, found = time.monotonic() + timeout if timeout else None, {}
        with selectors.DefaultSelector() as selector:
            for stream in filter(None, (self.stdout, self.stderr)):
                selector.register(stream, selectors.EVENT_READ)
                found[stream] = b""
            while selector.get_map():
                left = None if end is None else end - time.monotonic()
                if left is not None and left <= 0:
                    self.kill()
                    self.wait()
                    raise subprocess.TimeoutExpired(self.args, timeout)
                for key, _ in selector.select(left):
                    found[key.fileobj] += (got := os.read(key.fd, 1 << 16))
                    if not got:
                        selector.unregister(key.fileobj)
        self.wait(timeout)
        texts = [found[one].decode("utf-8", "replace") if one else None for one in (self.stdout, self.stderr)]
        for stream in filter(None, (self.stdout, self.stderr)):
            stream.close()
        return texts[0], texts[1]

    def send_signal(self, number: int) -> None:
        if self.poll() is None:
            os.kill(self.pid, number)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)


class ForkServer:
    """The process that others are forked from; it ends with this one."""

    def __init__(self):
        self.folder = tempfile.TemporaryDirectory(prefix="fork-server-")
        self.address = str(Path(self.folder.name) / "socket")
        environment = {name: value for name, value in os.environ.items() if not name.startswith("HF_")}
        environment |= {name: f"/proc/self/fd/{number}" for name, number in _FOLDERS.items()}
        environment |= {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}
        self.log = open(Path(self.folder.name) / "log", "w+")
        self.process = subprocess.Popen(
            [sys.executable, __file__, self.address],
            env=environment, stdin=subprocess.PIPE, stdout=self.log, stderr=subprocess.STDOUT, start_new_session=True,
        )  # fmt: skip

    def connect(self) -> socket.socket:
        end = time.monotonic() + 300
        while True:
            connection = socket.socket(socket.AF_UNIX)
            try:
                connection.connect(self.address)
                return connection
            except OSError:
                connection.close()
                if self.process.poll() is not None or time.monotonic() > end:
                    raise AssertionError(f"no fork server:\n{Path(self.log.name).read_text()[-4000:]}") from None
                time.sleep(0.02)


_server: ForkServer | None = None
_starting = threading.Lock()


def start(
    command: Sequence, *, cwd=None, env: Mapping[str, str] | None = None, stdin=None, stdout=None, stderr=None,
    start_new_session: bool = False,
):  # fmt: skip
    """A process of this interpreter, forked where that can be done.

    Args:
        command: the interpreter, then `-m MODULE`, `-c CODE` or a script, and arguments.
    """
    global _server
    command = [str(word) for word in command]
    env = dict(os.environ if env is None else env)
    options = {"cwd": cwd, "env": env, "stdin": stdin, "stdout": stdout, "stderr": stderr}
    forks = AVAILABLE and command[0] == sys.executable and not re.match("-[^cm]", command[1])
    if not forks or _is_for_the_start(env):
        return subprocess.Popen(command, **options, text=True, start_new_session=start_new_session)
    with _starting:
        _server = _server or ForkServer()
    request = {"argv": command, "cwd": str(cwd or os.getcwd()), "env": env, "session": start_new_session}
    return ForkedProcess(_server, request, {"stdin": stdin, "stdout": stdout, "stderr": stderr})


def _is_for_the_start(env: Mapping[str, str]) -> bool:
    """Whether a variable says something to Python itself, which reads it when it starts."""
    honored = ("PYTHONUNBUFFERED", "PYTHONDONTWRITEBYTECODE", "PYTHONPYCACHEPREFIX")
    names = {name for name in env if name.startswith("PYTHON")} - set(honored)
    return any(env[name] != os.environ.get(name) for name in names)


def run(
    command: Sequence, *, cwd=None, env: Mapping[str, str] | None = None, timeout: float | None = None, **_
) -> subprocess.CompletedProcess:
    """`subprocess.run` with both outputs captured as text."""
    process = start(command, cwd=cwd, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    output, errors = process.communicate(timeout=timeout)
    return subprocess.CompletedProcess(process.args, process.returncode, output, errors)


# --- in the server


def _serve(address: str) -> dict | None:
    """Forks for every request. Returns in each forked process, with the request, and in the server when it ends."""
    children: dict[int, socket.socket] = {}
    with socket.socket(socket.AF_UNIX) as listener, selectors.DefaultSelector() as selector:
        listener.bind(address)
        listener.listen(64)
        selector.register(listener, selectors.EVENT_READ)
        selector.register(0, selectors.EVENT_READ)
        while True:
            ready = [key.fileobj for key, _ in selector.select(0.005 if children else None)]
            if 0 in ready:  # the tests have ended
                for pid in children:
                    os.kill(pid, signal.SIGKILL)
                return None
            if listener in ready:
                connection, _ = listener.accept()
                request = _receive(connection)
                pid = os.fork()
                if not pid:
                    for one in (*children.values(), connection):
                        one.close()
                    return request
                for stream in request["streams"]:
                    os.close(stream)
                connection.sendall(b"%d\n" % pid)
                children[pid] = connection
            for pid in list(children):
                done, status = os.waitpid(pid, os.WNOHANG)
                if done:
                    with contextlib.suppress(OSError), children.pop(pid) as connection:
                        connection.sendall(b"%d\n" % os.waitstatus_to_exitcode(status))


def _receive(connection: socket.socket) -> dict:
    text, streams, *_ = socket.recv_fds(connection, 1 << 16, 3)
    while not text.endswith(b"\n"):
        text += connection.recv(1 << 16)
    return {**json.loads(text), "streams": streams}


def _become(argv: list[str], cwd: str, env: dict[str, str], session: bool, streams: list[int]) -> None:
    """Makes of this forked process what a fresh one would be."""
    for number, stream in enumerate(streams):
        os.dup2(stream, number)
        os.close(stream)
    if session:
        os.setsid()
    signal.signal(signal.SIGINT, signal.default_int_handler)
    os.environ.clear()
    os.environ.update(env)
    os.chdir(cwd)
    sys.stdout.reconfigure(write_through=bool(env.get("PYTHONUNBUFFERED")))
    sys.dont_write_bytecode = bool(env.get("PYTHONDONTWRITEBYTECODE"))
    random.seed()
    sys.modules["numpy"].random.seed()
    home = env.get("HF_HOME") or os.path.expanduser("~/.cache/huggingface")
    _lead_to("HF_HOME", home)
    _lead_to("HF_MODULES_CACHE", env.get("HF_MODULES_CACHE") or os.path.join(home, "modules"))
    _set_hub_constants(env, home)


def _lead_to(name: str, folder: str) -> None:
    os.makedirs(folder, exist_ok=True)
    opened = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    os.dup2(opened, _FOLDERS[name])
    os.close(opened)


def _set_hub_constants(env: dict[str, str], home: str) -> None:
    """What huggingface_hub and datasets read from the environment when they are imported, other than folders."""
    from huggingface_hub import constants, hf_api

    def yes(*names: str) -> bool:
        return any(env.get(name, "").upper() in ("1", "ON", "YES", "TRUE") for name in names)

    constants.HF_HUB_OFFLINE = yes("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE")
    constants.HF_HUB_DISABLE_XET = yes("HF_HUB_DISABLE_XET")
    constants.HF_TOKEN_PATH = env.get("HF_TOKEN_PATH") or os.path.join(home, "token")
    if "HF_ENDPOINT" in env:
        constants.ENDPOINT = hf_api.api.endpoint = env["HF_ENDPOINT"]
        constants.HUGGINGFACE_CO_URL_TEMPLATE = env["HF_ENDPOINT"] + "/{repo_id}/resolve/{revision}/{filename}"
    if hasattr(sys.modules["transformers.utils.hub"], "_is_offline_mode"):  # transformers 4
        sys.modules["transformers.utils.hub"]._is_offline_mode = constants.HF_HUB_OFFLINE
    if "datasets" in sys.modules:
        config = sys.modules["datasets"].config
        config.HF_HUB_OFFLINE = constants.HF_HUB_OFFLINE
        config.HF_ENDPOINT = constants.ENDPOINT


def _execute(argv: list[str]) -> None:
    """What Python does with its command line."""
    sys.orig_argv, (what, *arguments) = argv, argv[1:]
    if what == "-m":
        name, *arguments = arguments
        sys.argv = ["-m", *arguments]  # until the module is found
        sys.path.insert(0, os.getcwd())
        runpy.run_module(name, run_name="__main__", alter_sys=True)
    elif what == "-c":
        code, *arguments = arguments
        sys.argv = ["-c", *arguments]
        sys.path.insert(0, "")
        main = sys.modules["__main__"] = types.ModuleType("__main__")
        exec(compile(code, "<string>", "exec"), main.__dict__)
    else:
        sys.argv = [what, *arguments]
        sys.path.insert(0, str(Path(what).resolve().parent))
        runpy.run_path(what, run_name="__main__")


if __name__ == "__main__":
    del sys.path[0]  # this folder
    for name in _FOLDERS:
        _lead_to(name, os.path.dirname(sys.argv[1]))
    for name in PRELOADED:
        if importlib.util.find_spec(name.partition(".")[0]):
            importlib.import_module(name)
    gc.freeze()
    if request := _serve(sys.argv[1]):
        _become(**request)
        _execute(request["argv"])
