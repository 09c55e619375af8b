"""Portable Mamba-2 kernels in plain PyTorch, with the signatures of mamba-ssm's."""
