"""Hugging Face <-> native checkpoints, over one table of names, a tensor at a time."""
