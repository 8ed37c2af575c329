"""Attention: one function for the sampler and the learner, on rows that may be trees."""

from pyrl.attention.interface import plain_attention, use_pyrl_attention
from pyrl.attention.layout import Layout

__all__ = ["Layout", "plain_attention", "use_pyrl_attention"]
