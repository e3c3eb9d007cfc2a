"""Clocks, roofline, weight formats, times of layers and models. Floor 7: stands on pruning."""
