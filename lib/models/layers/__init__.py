"""Where blocks, prunable matrices and head of a network are: one table of names for each way that transformers builds them."""
