"""Rounding, and pruning and rounding in one sweep (pure). Floor 6: stands on pruning."""
