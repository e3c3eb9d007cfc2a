"""Articles, corpora and how text becomes tokens. Floor 4: stands on models."""
