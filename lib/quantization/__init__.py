"""Rounding, and pruning and rounding in one sweep (pure). Floor 7: stands on pruning."""
