"""Plans: what a program would take per rank, from running it on tensors without data."""
