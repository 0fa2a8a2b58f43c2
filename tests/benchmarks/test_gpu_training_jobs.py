"""What the jobs of benchmarks/gpu_jobs that train make of figures."""

import importlib.util
from types import SimpleNamespace

import pytest
from helpers.paths import BENCHMARKS


JOBS = BENCHMARKS / "gpu_jobs"


def load(name: str, monkeypatch):
    for folder in (JOBS, JOBS.parent):
        monkeypatch.syspath_prepend(str(folder))
    spec = importlib.util.spec_from_file_location(f"gpu_job_{name}", JOBS / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_training_s_table_has_a_row_for_each_case_and_the_original_beside_it(monkeypatch):
    module = load("training", monkeypatch)
    row = {
        "name": "7b 768 stage 3 bf16",
        "trains": 6.8e9,
        "weights": 7.1e9,
        "batch": 8,
        "halved": True,
        "checkpointing": True,
        "length": 344.2,
        "samples": 2 * module.ORIGINAL,
        "flops": 400e12,
        "share": 0.5,
        "share of data sheet": 0.404,
        "peak": 48 * 2**30,
        "waits": 0.012,
    }
    failed = {"name": "7b 768 stage 1 fp32", "failed": "MemoryError: Neither 16 samples nor half of them fit."}
    loader = {"name": "loader 768", "loaded": 251.4, "workers": 8}
    said = module.tables({"cases": [row, failed, loader]})
    assert (
        "| 7b 768 stage 3 bf16 | 6,800 of 7,100 M | 8 (halved) | yes | 344 | 9.24 | 400 | 50.0% | 40.4% | 48.0 GiB | "
        "1.2% |" in said
    )
    assert "failed: MemoryError: Neither 16 samples" in said
    assert "9.2 samples/s, 2.00 times the original's 4.6 a GPU" in said
    assert "loader 768: 251 samples/s from 8 processes." in said


def test_a_batch_that_does_not_fit_is_halved_once(monkeypatch):
    module = load("training", monkeypatch)
    torch = pytest.importorskip("torch")
    tried = []

    def measure(settings):
        tried.append(settings["batch"])
        if settings["batch"] > 4:
            raise torch.OutOfMemoryError("too much")
        return {"flops": 1e12}

    monkeypatch.setattr(module, "measure", measure)
    figures = module._measured({"batch": 8, "side": 64}, rate=4e12)
    assert (figures["batch"], figures["halved"], figures["share"]) == (4, True, 0.25)
    with pytest.raises(MemoryError, match="Neither 32 samples nor half of them fit"):
        module._measured({"batch": 32, "side": 64}, rate=4e12)
    assert tried == [8, 4, 32, 16]


def test_little_shared_memory_means_few_processes(monkeypatch):
    module = load("training", monkeypatch)
    usage = SimpleNamespace(free=64 * 2**20)
    monkeypatch.setattr(module.shutil, "disk_usage", lambda path: usage)
    assert module.loader_workers(16, 768) == 0
    usage.free = 2**40
    monkeypatch.setattr(module.os, "cpu_count", lambda: 16)
    assert module.loader_workers(16, 768) == 8


def test_kernels_that_overlap_are_busy_once(monkeypatch):
    module = load("profile_training", monkeypatch)
    kernels = [
        ("nvjet_tst_128x256", 0.0, 4000.0),
        ("Memcpy HtoD", 3000.0, 5000.0),  # 1000 of it at the same time
        ("void at::native::elementwise_kernel<gelu>", 7000.0, 10000.0),
    ]
    found = module.summary(kernels)
    assert found["wall"] == 10 / module.PROFILED and found["busy"] == 8 / module.PROFILED
    assert found["busy share"] == pytest.approx(0.8) and found["gap"] == pytest.approx(2.0)
    assert found["kinds"] == pytest.approx({"matrix products": 4 / 9, "element-wise": 3 / 9, "copies": 2 / 9})
    row = {"name": "stage 3", "model": "1.5b", "side": 768, "batch": 32, **found}
    said = module.tables({"cases": [row]})
    assert "busy 80%" in said and "| `nvjet_tst_128x256` | matrix products | 2.00 | 44.4% | 0 |" in said


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("sm90_xmma_gemm_bf16bf16_bf16f32_f32_tn_n_tilesize128x128x64", "matrix products"),
        ("void pytorch_flash::flash_fwd_kernel<Flash_fwd_kernel_traits<128>>", "attention"),
        ("void at::native::conv_depthwise2d_forward_kernel<7, float, int>", "convolutions"),
        ("void kOptimizerStatic8bit2StateBlockwise<__nv_bfloat16, 0, 256, 1>", "optimizer"),
        ("_backward_kernel", "loss"),
        ("void at::native::(anonymous namespace)::vectorized_layer_norm_kernel<float, float>", "norms"),
        ("void at::native::vectorized_elementwise_kernel<4, at::native::SiluFunctor>", "element-wise"),
        ("void at::native::reduce_kernel<512, 1, at::native::ReduceOp<float>>", "reductions"),
        ("ncclDevKernel", "other"),
    ],
)
def test_a_kernel_is_known_by_its_name(name, kind, monkeypatch):
    assert load("profile_training", monkeypatch).kind_of(name) == kind


def test_the_quickstart_is_shown_beside_the_cpu_s(monkeypatch):
    module = load("quickstart", monkeypatch)
    row = {
        "name": "seed 0",
        "finished": False,
        "wall": 100.0,
        "seconds": {"vision tower": 31.2, "stage 1": 9.0},
        "accuracy": {"reading": 0.91},
    }
    said = module.tables({"cases": [row]})
    assert "seed 0: 100 s, cut off when the time was up." in said
    assert "| vision tower | 31 s | 94 s |" in said and "| stage 2 |  | 226 s |" in said
    assert "| reading | 91.0% | 91.2% to 93.3% |" in said
    assert "failed: RuntimeError: no" in module.tables({"cases": [{"name": "seed 0", "failed": "RuntimeError: no"}]})
