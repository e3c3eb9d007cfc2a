"""Articles, corpora and how text becomes tokens. Floor 5: stands on models."""
