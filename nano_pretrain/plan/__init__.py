"""What a recipe costs: parameters and FLOPs, from arithmetic alone. Imports no torch."""
