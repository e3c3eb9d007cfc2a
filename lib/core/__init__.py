"""Errors, settings, device and seeds, provenance, and the environment. Floor 0: imports no other room."""
