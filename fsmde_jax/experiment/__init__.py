"""Experiments: many runs of the training and the evaluation job, compared over seeds; see `__main__`."""
