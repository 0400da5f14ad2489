"""Measurements of the system: speed, and loss over time."""
