"""Measurements of K-1 itself: the time of a step, and the time to a loss."""
