"""Decoding as it should be: states of fixed place, prefill in chunks, and a step of all layers in one CUDA graph."""

from hybridize.inference.engine import Engine
from hybridize.inference.sampling import Sampling

__all__ = ["Engine", "Sampling"]
