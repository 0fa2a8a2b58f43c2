"""Conversations with pictures: read, checked, looked at, and made ready for training."""

from .sources import load_training_data


__all__ = ["load_training_data"]
