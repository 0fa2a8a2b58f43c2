"""Tests of what runs on a GPU: `pytest -m gpu tests/gpu`.

Without CUDA all of them are skipped; with CONVLLAVA_GPU_REHEARSAL=1 they run on the CPU, but for what CUDA alone has.
"""
