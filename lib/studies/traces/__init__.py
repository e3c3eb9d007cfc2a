"""Notebook 01: where sinks sit, and whether they move."""
