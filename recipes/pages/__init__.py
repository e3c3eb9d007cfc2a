"""Numbers in the text of README, docs and data/README: written between marks, from code, data and records of runs."""
