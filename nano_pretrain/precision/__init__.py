"""FP8: quantisation of matrices in tiles and per tensor, and linears whose products have quantised operands."""
