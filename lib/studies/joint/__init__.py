"""Notebook 05: pruning and quantization together, and a format for every layer."""
