"""What each notebook compares, tabulates and draws, a folder a subject. Floor 8: stands on every room below."""
