"""Settings of what no notebook runs."""
