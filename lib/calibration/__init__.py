"""What a calibration reads, how its tokens count, and the statistics it leaves. Floor 5: stands on diffusion and attention."""
