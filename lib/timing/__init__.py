"""Clocks, roofline, weight formats, times of layers and models. Floor 6: stands on pruning."""
