"""The paper's main table on one GPU in one day: its cells, how they are answered, what they cost, and its verdicts."""
