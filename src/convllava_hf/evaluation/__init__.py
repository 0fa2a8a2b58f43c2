"""How good a checkpoint is: benchmarks, metrics, runs and their records, and the doors to other projects' evaluations."""
