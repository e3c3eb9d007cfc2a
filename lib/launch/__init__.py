"""What ./run_all.sh does. Floor 9: stands on everything."""
