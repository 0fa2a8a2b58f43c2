"""Staged training over TRL's `SFTTrainer`: what trains, at which rate, in which order, and how a run survives."""
