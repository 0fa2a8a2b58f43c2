"""Conversations with images: read, checked, looked at, and made ready for training."""

from .training_data import load_training_data


__all__ = ["load_training_data"]
