"""The experiment grid: cells, plan, records, and the engine. Floor 9: stands on studies."""
