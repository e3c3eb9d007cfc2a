"""Runnable recipes that made `models/reference` and `data`."""
