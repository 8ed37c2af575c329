"""Presets: published policy losses by name; `pyrl.loss.presets` defines them."""

from pyrl.loss.presets import *  # noqa: F403 (a plain re-export, whatever is added there)
