"""Publishing: a checkpoint as a page on the Hub that others can use."""

from .metadata import About, read_about
from .push import Pushed, push
from .results import Result, read_results


__all__ = ["About", "Pushed", "Result", "push", "read_about", "read_results"]
