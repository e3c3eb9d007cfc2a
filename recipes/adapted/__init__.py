"""How the adapted model is made: a pretrained English encoder, continued as a masked diffusion model."""
