"""The analytical step: closed forms that fit corrections, and the denoiser by retrieval."""
