"""Sharded checkpoints: written beside, verified, renamed; the newest whole one is found."""
