"""Starting the ranks of a run; imports torch only when it starts something."""
