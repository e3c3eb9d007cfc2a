"""What each notebook compares, tabulates and draws, a folder a subject. Floor 7: stands on every room below."""
