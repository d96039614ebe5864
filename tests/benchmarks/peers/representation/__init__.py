"""Pretraining by lightly's methods with a budget of CPU time, for the comparison of representations."""
