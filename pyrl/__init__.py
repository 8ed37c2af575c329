"""pyrl: tree-rollout test-time RL. Fork where the model is unsure, vote, learn."""

from pyrl._core import StaleHandleError, build_info
from pyrl._core.tree import Forest
from pyrl.logits.linear_token_stats import linear_token_stats
from pyrl.logits.sample_tokens import sample_tokens
from pyrl.logits.token_stats import token_stats
from pyrl.loss.fused import fused_policy_loss, linear_policy_loss
from pyrl.loss.policy_loss import policy_loss

__version__: str = build_info()["version"]

__all__ = [
    "Forest",
    "StaleHandleError",
    "build_info",
    "fused_policy_loss",
    "linear_policy_loss",
    "linear_token_stats",
    "policy_loss",
    "sample_tokens",
    "token_stats",
]
