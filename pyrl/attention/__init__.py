"""Attention: one function for the sampler and the learner, on rows that may be trees."""

from pyrl.attention.interface import use_pyrl_attention
from pyrl.attention.layout import Layout

__all__ = ["Layout", "use_pyrl_attention"]
