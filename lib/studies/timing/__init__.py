"""Notebook 06: what compressed weights and faster decoders buy."""
