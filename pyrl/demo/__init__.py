"""The embedded default: a small transformer that sorts digits, and questions too long for it."""

from pyrl.models import DEMO_MODEL as MODEL
from pyrl.sources import DEMO_QUESTIONS as QUESTIONS

__all__ = ["MODEL", "QUESTIONS"]
