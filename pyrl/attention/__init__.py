"""Attention: one function for the sampler and the learner, on rows that may be trees."""

from pyrl.attention.interface import attending, plain_attention, use_pyrl_attention
from pyrl.attention.layout import Layout

__all__ = ["Layout", "attending", "plain_attention", "use_pyrl_attention"]
