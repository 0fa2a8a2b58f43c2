"""The pure parts of the GPU run's jobs about the tower and answers: buckets, kernels' kinds, tables."""

import pytest
from helpers.paths import BENCHMARKS


JOBS = BENCHMARKS / "gpu_jobs"


@pytest.fixture(autouse=True)
def jobs(monkeypatch):
    monkeypatch.syspath_prepend(str(JOBS))


def test_buckets_hold_every_size_and_the_smallest_is_taken():
    from buckets import bucket_of, holds, make_buckets

    counts = {(64, 64): 10, (64, 128): 1, (128, 64): 1, (128, 128): 5, (640, 64): 1}
    for number in range(1, 6):
        buckets = make_buckets(counts, number)
        assert len(buckets) <= number
        for size in counts:
            taken = bucket_of(size, buckets)
            assert holds(taken, size)
            assert not any(holds(other, size) and other[0] * other[1] < taken[0] * taken[1] for other in buckets)
    assert set(make_buckets(counts, 5)) == set(counts)
    assert make_buckets(counts, 1) == [(640, 128)]
    # 64 x 128 and 128 x 64, once each, cost least within 128 x 128, which is there already.
    assert set(make_buckets(counts, 3)) == {(64, 64), (128, 128), (640, 64)}


def test_padding_is_counted_in_pixels_of_the_mix():
    from buckets import padding_added

    counts = {(64, 64): 3, (64, 128): 1}  # 5 tiles of 64 x 64
    assert padding_added(counts, [(64, 64), (64, 128)]) == 0
    assert padding_added(counts, [(64, 128)]) == pytest.approx(8 / 5 - 1)
    with pytest.raises(ValueError, match="64 x 128"):
        padding_added(counts, [(64, 64)])


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        (
            "void at::native::(anonymous namespace)::conv_depthwise2d_forward_kernel_generic<c10::BFloat16, int>(...)",
            0,
        ),
        ("void conv2d_c1_k1_nhwc_kernel<__nv_bfloat16, __nv_bfloat16, float, 7, 7>(...)", 0),
        ("void at::native::(anonymous namespace)::vectorized_layer_norm_kernel<c10::BFloat16, float>(int)", 1),
        ("nvjet_tst_128x256_64x4_2x1_v_bz_coopA_bias_TNT", 2),
        ("sm80_xmma_fprop_implicit_gemm_bf16bf16_bf16f32_f32_nhwckrsc_nhwc_tilesize128x128x32", 2),
        ("void cudnn::ops::nchwToNhwcKernel<__nv_bfloat16, __nv_bfloat16, float>(...)", 3),
        (
            "void at::native::elementwise_kernel<128, 4, at::native::direct_copy_kernel_cuda(...)::{lambda()#3}>(int)",
            3,
        ),
        (
            "void at::native::vectorized_elementwise_kernel<4, at::native::GeluCUDAKernelImpl(at::Tensor&)>",
            4,
        ),
        ("_depthwise_kernel", 0),
        ("_norm_kernel", 1),
        ("_gelu_kernel", 4),
        ("spin_kernel", 5),
    ],
)
def test_kernels_are_sorted_by_their_names(name, kind):
    from profile_tower import KINDS, OTHER, kind_of

    assert kind_of(name) == [*KINDS, OTHER][kind]


def test_a_profile_is_summed_by_kind():
    from profile_tower import short_name, summary, tables

    name = "void at::native::vectorized_elementwise_kernel<4, at::native::GeluCUDAKernelImpl(at::TensorIteratorBase&)>"
    assert short_name(name) == "vectorized_elementwise_kernel<4, GeluCUDAKernelImpl"
    kept = summary([("some_gemm", 6.0, 2), ("other_gemm", 2.0, 1), (name, 2.0, 40)])
    assert kept["kinds"] == pytest.approx({"matrix products": 0.8, "elementwise": 0.2})
    assert (kept["total_ms"], kept["kernel_calls"]) == (10, 43)
    assert [kernel["ms"] for kernel in kept["top"]] == [6, 2, 2]
    row = {"name": "eager, 1536, batch 1", "way": "eager", "size": [1536, 1536], "batch": 1, "ms": 11.0, **kept}
    text = tables({"cases": [row, {"name": "channels-last", "failed": "RuntimeError: none"}]})
    assert "| `some_gemm` | matrix products | 6.000 | 60.0% | 2 |" in text
    assert "failed: RuntimeError: none" in text


def test_tables_of_the_tower_show_what_was_measured_and_what_failed():
    from tower import tables

    row = {
        "name": "ours, eager, 768, batch 1", "kind": "ours", "way": "eager", "size": [768, 768], "batch": 1, "ms": 4.0,
        "images_per_s": 250.0, "tflop": 0.944, "share": 0.351, "weights": 2**31, "activations": None, "change": 0.0042,
        "first_call_s": 0.3,
    }  # fmt: skip
    failed = {"name": "ours, compiled", "kind": "ours", "way": "compiled", "failed": "OutOfMemoryError: no"}
    bucket = {
        "name": "buckets, eager", "way": "eager", "shapes": 22, "ms_own_shape": 9.0, "buckets": [[64, 64]],
        "ms_in_buckets": 10.0, "first_calls_s": 1.0, "padding_added": {"1": 2.74},
    }  # fmt: skip
    text = tables({"cases": [row, failed, bucket]})
    assert "| ours, eager | 768 x 768 | 1 | 4.00 | 250.0 | 0.94 | 35.1% | 2.00 GiB |  | 4.2e-03 | 0.3 s |" in text
    assert "failed: OutOfMemoryError: no" in text
    assert "| eager | 22 | 9.00 | 1 | 10.00 | 1.0 s |" in text
    assert "1: 274%" in text
    assert tables({"cases": []}) == ""


def test_tables_of_answers_are_one_for_each_language_model():
    from answers import tables

    row = {
        "name": "ours", "model": "ours", "text": "7b", "cache": "dynamic", "size": [768, 768], "batch": 1,
        "visual_tokens": 144, "first_token_s": 0.05, "prefill_ms": 44.0, "tower_ms": 8.0, "projector_ms": 0.2,
        "language_model_ms": 35.0, "tokens_per_s": 40.0, "weights": 2**34, "peak": None, "warm_up_s": 1.0,
    }  # fmt: skip
    failed = {"name": "FastVLM", "model": "FastVLM", "text": "0.5b", "failed": "ImportError: timm"}
    text = tables({"cases": [failed, row]})
    assert text.index("A language model of 0.5b") < text.index("failed: ImportError: timm") < text.index("of 7b")
    assert "| ours | 768 x 768 | 1 | 144 | 50.0 | 44.0 | 8.0 | 0.2 | 35.0 | 40.0 | 16.00 GiB |  | 1.0 s |" in text
