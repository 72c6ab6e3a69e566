"""Training, and what can be done with the model of a run: evaluation, prediction."""
