"""How good a checkpoint is: benchmarks, metrics, runs, and models for other projects' evaluations."""

from pathlib import Path


# Our metrics as modules of the `evaluate` library, one folder each: `evaluate.load(str(MODULES / "anls"))`.
MODULES = Path(__file__).with_name("evaluate_modules")
