"""What pruning loses, and which share of it a change recovers: the decisive claims of notebooks 03 and 04."""
