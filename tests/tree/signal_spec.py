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
        "confidence_fork": None,
        "entropy_rise": None,
        "confidence_low": None,
        "tail_low": None,
        "entropy_spike": None,
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
