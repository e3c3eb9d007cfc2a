"""Notebooks 03 and 04: many pruned models on the same windows, and what the sinks have to do with it."""
