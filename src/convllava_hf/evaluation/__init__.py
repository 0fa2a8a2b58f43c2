"""How good a checkpoint is: benchmarks, metrics, runs, and the doors to other projects' evaluations."""

from pathlib import Path


# Of our metrics as modules for `evaluate.load(str(MODULES / "anls"))`, a folder each.
MODULES = Path(__file__).with_name("evaluate_modules")
