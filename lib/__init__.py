"""Helpers behind the numbered notebooks: load, noise, sample, measure attention sinks, report."""
