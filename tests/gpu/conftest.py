"""What all tests of this folder have in common: the device, float32 without TF32, models on the device."""

import os


os.environ.setdefault("TORCHINDUCTOR_COMPILE_THREADS", "4")  # for each worker of pytest-xdist

import copy  # noqa: E402
import functools  # noqa: E402
import gc  # noqa: E402
import shutil  # noqa: E402
from pathlib import Path  # noqa: E402

import pytest  # noqa: E402
import torch  # noqa: E402
from helpers.tiny_models import make_processor  # noqa: E402

from .devices import CUDA, DEVICE, REHEARSAL  # noqa: E402


def pytest_collection_modifyitems(items) -> None:
    here = Path(__file__).parent
    skip = pytest.mark.skip(reason="needs a CUDA device (CONVLLAVA_GPU_REHEARSAL=1 rehearses on the CPU)")
    for item in items:
        if not (CUDA or REHEARSAL) and here in item.path.parents:
            item.add_marker(skip)


@pytest.fixture(scope="session")
def device() -> torch.device:
    return DEVICE


@pytest.fixture(autouse=True)
def exact_products():
    """cuDNN's convolutions of float32 round to TF32's ten bits otherwise."""
    before = torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    yield
    torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32 = before


@pytest.fixture(autouse=True, scope="module")
def freed_memory():
    """Several workers share the device."""
    yield
    gc.collect()
    if CUDA:
        torch.cuda.empty_cache()


@pytest.fixture(scope="session")
def model_on(model):
    """A function: the tiny model on a device in a dtype, read-only."""

    @functools.cache
    def put(device: torch.device, dtype: torch.dtype):
        return copy.deepcopy(model).to(device, dtype)

    return put


@pytest.fixture
def fresh_compiler():
    torch.compiler.reset()
    torch._dynamo.utils.counters.clear()
    yield
    torch.compiler.reset()


@pytest.fixture(scope="session")
def wide(wide_checkpoint, tmp_path_factory) -> Path:
    """The model that is wide enough for every quantizer, with its processor."""
    folder = tmp_path_factory.mktemp("wide-on-gpu") / "model"
    shutil.copytree(wide_checkpoint, folder)
    make_processor().save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def image_file(tmp_path_factory) -> Path:
    from helpers.tiny_models import make_image

    path = tmp_path_factory.mktemp("image") / "image.png"
    make_image(90, 140).save(path)
    return path
