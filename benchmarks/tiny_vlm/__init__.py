"""A small VLM trained for the purpose: its task, its training, and loading it. See README.md."""
