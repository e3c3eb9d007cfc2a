"""What lies on disk: find a checkpoint's files, check them, and translate each family's layout. Floor 1: stands on core."""
