"""Process groups and the layout of the ranks."""
