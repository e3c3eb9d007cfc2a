"""Importances and masks (pure), methods by name, one pruner, smaller models. Floor 6: stands on calibration."""
