"""What ./run_all.sh does. Floor 10: stands on everything."""
