"""Experiments in continual learning: methods x orders of domains x seeds, and what is forgotten."""
