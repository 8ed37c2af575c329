"""Small settings of signals."""

from typing import Any

from pyrl._core.tree import SignalSpec, Threshold


def make_spec(**values: Any) -> SignalSpec:
    """Small windows, decisions from the first token, and no thresholds that stand in the way."""
    defaults: dict[str, Any] = {
        "smooth_window": 2,
        "group_window": 3,
        "tail_window": 4,
        "min_tokens": 0,
        "warmup_traces": 0,
        "entropy_high": Threshold(value=0.5),
        "confidence_fork": Threshold(value=1e30),
        "entropy_rise": Threshold(value=-1e30),
        "confidence_low": Threshold(value=-1e30),
        "tail_low": Threshold(value=-1e30),
        "entropy_spike": Threshold(value=1e30),
        "alpha": 0.0,
        "beta": 0.0,
        "width_min": 2,
        "width_max": 2,
        "cooldown": 0,
    }
    spec = SignalSpec()
    for name, value in (defaults | values).items():
        setattr(spec, name, value)
    return spec
