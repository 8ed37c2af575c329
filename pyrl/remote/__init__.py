"""Remote: a run whose model is sampled and trained by a server of the Tinker protocol."""
