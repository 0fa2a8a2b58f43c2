"""Where the tests find the checkout's files."""

from pathlib import Path


TESTS = Path(__file__).parents[1]
ROOT = TESTS.parent
HELPERS = TESTS / "helpers"
GOLDEN = TESTS / "golden"  # figures that the original code computed
MODELING = ROOT / "modeling"  # the code that is saved with every checkpoint
RECIPES = ROOT / "recipes"
BENCHMARKS = ROOT / "benchmarks"
