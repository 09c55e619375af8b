"""C++ versions of the portable kernels for CPUs, compiled once for the machine they run on.

`build` compiles the sources of this directory and keeps the result in the user's cache; `library` loads it and says
which kernels are in use. The functions of `nano_pretrain.kernels` take the native version where `active` gives one,
and are plain PyTorch everywhere else.
"""
