"""How fast a ConvLLaVA is on this machine, against what the machine can do: what `convllava profile` runs."""

from .machine import copy_bandwidth, describe, matrix_rate
from .models import random_model
from .profiler import profile_model


__all__ = ["profile_model", "copy_bandwidth", "describe", "matrix_rate", "random_model"]
