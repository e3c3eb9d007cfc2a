"""Notebook 02: how variable sinks are, and what blocking them costs."""
