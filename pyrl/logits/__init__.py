"""Logits: what has a vocabulary axis. Statistics of rows, their gradient, and the draw."""
