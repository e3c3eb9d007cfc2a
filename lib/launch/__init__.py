"""What ./run_all.sh does. Floor 11: stands on everything."""
