"""Triton's kernels give the eager tower's features: on the CPU, by Triton's interpreter, in a process of its own."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from convllava_hf.errors import ConvLlavaError
from convllava_hf.inference import vision_backends
from convllava_hf.inference.vision_backends import choose_vision_backend


TESTS = Path(__file__).parents[1]


def run_interpreted(function: str) -> None:
    """One of `triton_checks`, in a process where Triton interprets: it asks for that when a kernel is defined."""
    pytest.importorskip("triton")
    ran = subprocess.run(
        [sys.executable, "-c", f"from helpers import triton_checks; triton_checks.{function}()"],
        env={**os.environ, "TRITON_INTERPRET": "1", "PYTHONPATH": str(TESTS)},
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert ran.returncode == 0, ran.stderr


@pytest.mark.slow
def test_each_kernel_is_torch_s_operation():
    run_interpreted("check_kernels")


@pytest.mark.slow
def test_features_are_the_eager_tower_s():
    run_interpreted("check_tower")


@pytest.mark.parametrize("tower", ["triton", "triton-graphs"])
def test_a_cpu_is_refused(tower):
    with pytest.raises(ConvLlavaError, match="needs CUDA, and the device is cpu"):
        choose_vision_backend(torch.device("cpu"), torch.bfloat16, tower)


@pytest.mark.parametrize(("missing", "message"), [("triton", "needs Triton"), ("compiler", "Triton needs one of gcc")])
def test_triton_and_a_compiler_are_needed(missing, message, monkeypatch):
    monkeypatch.setattr(
        vision_backends.importlib.util, "find_spec", lambda name: None if missing == "triton" else object()
    )
    monkeypatch.setattr(vision_backends.shutil, "which", lambda name: None)
    for tower in ("triton", "triton-graphs"):
        with pytest.raises(ConvLlavaError, match=message):
            choose_vision_backend(torch.device("cuda"), torch.bfloat16, tower)
