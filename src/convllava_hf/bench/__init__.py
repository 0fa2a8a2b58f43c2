"""How fast a ConvLLaVA is on this machine, beside what the machine could do: what `convllava bench` runs."""

from .machine import copy_bandwidth, describe, matrix_rate
from .models import random_model
from .running import bench


__all__ = ["bench", "copy_bandwidth", "describe", "matrix_rate", "random_model"]
