"""Importances and masks (pure), methods by name, one pruner, smaller models. Floor 5: stands on calibration."""
