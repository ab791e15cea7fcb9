"""Scores in and out of other interpretability libraries, by name and shape."""
