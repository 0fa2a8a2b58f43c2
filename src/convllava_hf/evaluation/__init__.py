"""How good a checkpoint is: metrics, and the doors to other projects' evaluations."""
