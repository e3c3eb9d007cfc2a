"""The experiment grid: cells, plan, records, and the engine. Floor 8: stands on studies."""
