"""How good a checkpoint is: benchmarks, metrics, runs, and the doors to other projects' evaluations."""
