"""The token clock, and the learning rate as a function of it. Imports no torch."""
