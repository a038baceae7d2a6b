"""A small VLM that was trained to measure pruning: its task, its training and its answers."""
