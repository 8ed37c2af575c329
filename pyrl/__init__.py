"""pyrl: tree-rollout test-time RL. Fork where the model is unsure, vote, learn."""
