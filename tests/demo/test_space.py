"""The Space's files as the Hub runs them: alone in a folder, without the package and without the network."""

import json
import os
import signal
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import pytest
from helpers.tiny_models import make_image

from convllava_hf.demo import space_files


pytestmark = pytest.mark.slow
pytest.importorskip("gradio")
gradio_client = pytest.importorskip("gradio_client")

# Takes away the editable installation, and writes down every attempt to reach another machine.
_SITE = """\
import os, socket, sys
sys.meta_path[:] = [finder for finder in sys.meta_path if "editable" not in repr(finder).lower()]

def note(what):
    with open(os.environ["NETWORK_LOG"], "a") as log:
        log.write(f"{what}\\n")

def is_here(address):
    return not isinstance(address, tuple) or str(address[0]) in ("127.0.0.1", "::1", "0.0.0.0", "localhost", "None")

def watched(name):
    original = getattr(socket.socket, name)
    def call(self, address, *args):
        if not is_here(address):
            note(f"{name} {address}")
        return original(self, address, *args)
    setattr(socket.socket, name, call)

for name in ("connect", "connect_ex"):
    watched(name)
look_up = socket.getaddrinfo
def getaddrinfo(host, *args, **kwargs):
    if not is_here((host,)):
        note(f"getaddrinfo {host}")
    return look_up(host, *args, **kwargs)
socket.getaddrinfo = getaddrinfo
"""


@pytest.fixture
def space(tmp_path, checkpoint):
    """Where a running Space answers, its process, and the file that other machines' names would be in."""
    folder = tmp_path / "space"
    for name, content in space_files("someone/ConvLLaVA-1536").items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(content, encoding="utf-8")
    (tmp_path / "site").mkdir()
    (tmp_path / "site" / "sitecustomize.py").write_text(_SITE)
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("GRADIO_", "HF_"))}
    environment |= {
        "CONVLLAVA_MODEL": str(checkpoint),
        "GRADIO_SERVER_PORT": str(_free_port()),
        "NETWORK_LOG": str(tmp_path / "network.txt"),
        "PYTHONPATH": str(tmp_path / "site"),
        "HF_HOME": str(tmp_path / "huggingface"),
        "TMPDIR": str(tmp_path / "temporary"),
        "OMP_NUM_THREADS": "1",
    }
    (tmp_path / "temporary").mkdir()
    (tmp_path / "network.txt").touch()
    with (tmp_path / "log.txt").open("w") as log:
        process = subprocess.Popen(
            [sys.executable, "app.py"], cwd=folder, env=environment, stdout=log, stderr=subprocess.STDOUT
        )
    try:
        url = f"http://127.0.0.1:{environment['GRADIO_SERVER_PORT']}"
        _until_it_answers(url, process, tmp_path / "log.txt")
        yield url, process, tmp_path
    finally:
        process.kill()
        process.wait()


def _free_port() -> int:
    import socket

    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        return taken.getsockname()[1]


def _until_it_answers(url: str, process, log: Path) -> None:
    deadline = time.monotonic() + 300
    while True:
        assert process.poll() is None and time.monotonic() < deadline, log.read_text()[-4000:]
        try:
            with urllib.request.urlopen(f"{url}/config", timeout=5):
                return
        except OSError:
            time.sleep(0.2)


def test_the_spaces_files_answer_without_the_package_and_ask_nothing_of_other_machines(space, checkpoint):
    url, process, folder = space
    client = gradio_client.Client(url, verbose=False)
    make_image(300, 400).save(folder / "image.jpg")
    image = gradio_client.handle_file(str(folder / "image.jpg"))
    with urllib.request.urlopen(f"{url}/config") as response:
        config = json.load(response)
    radio = next(part for part in config["components"] if part["props"].get("elem_id") == "resolution")
    preset = radio["props"]["choices"][0][0]
    messages, status = client.predict(image, "What is this?", preset, 8, 0, api_name="/ask")
    assert messages[0]["content"][0]["text"] == "What is this?"
    assert "visual tokens" in status and preset.startswith("128 × 128 px")
    assert str(checkpoint) not in json.dumps(config)  # the name of the folder alone
    assert (folder / "network.txt").read_text() == ""

    process.send_signal(signal.SIGTERM)
    assert process.wait(30) == 0, (folder / "log.txt").read_text()[-3000:]
    assert list((folder / "temporary").glob("convllava-demo-*")) == []  # uploads do not outlive the page
    assert "Traceback" not in (folder / "log.txt").read_text()
