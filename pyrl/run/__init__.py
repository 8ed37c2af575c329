"""Run: the settings of a run, its directory, its checkpoints, and what ends it early."""
