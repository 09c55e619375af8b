"""The loaded native kernels, and whether they are in use."""

from __future__ import annotations

import ctypes
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor

from nano_pretrain.kernels.native.build import BuildError, build
from nano_pretrain.recipe.errors import UserError

DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float64: 2}
"""Storage types of the kernels, and the codes of common.h."""


class Library:
    """The compiled kernels.

    Args:
        path: the shared library.
    """

    def __init__(self, path: Path) -> None:
        self._functions = ctypes.CDLL(str(path))

    def call(self, name: str, *arguments: Argument) -> None:
        """Call a kernel with this process's number of threads as its last argument.

        Args:
            name: of the C function.
            *arguments: tensors become pointers to their first element, arrays of integers pointers, None the null
                pointer, integers int64, floats double, dtypes their codes. Layout and life of the tensors are the
                caller's.
        """
        self._functions[name](*map(_converted, arguments), ctypes.c_int64(torch.get_num_threads()))

    def integer(self, name: str, *arguments: int | torch.dtype) -> int:
        """The int64 that a function of integers and dtypes returns."""
        function = self._functions[name]
        function.restype = ctypes.c_int64
        return int(function(*map(_converted, arguments)))


Argument = Tensor | int | float | torch.dtype | ctypes.Array[ctypes.c_int64] | None


def _converted(argument: Argument) -> ctypes.c_void_p | ctypes.c_int64 | ctypes.c_double | ctypes.Array[ctypes.c_int64]:
    if argument is None:
        return ctypes.c_void_p(None)
    if isinstance(argument, ctypes.Array):
        return argument
    if isinstance(argument, Tensor):
        return ctypes.c_void_p(argument.data_ptr())
    if isinstance(argument, torch.dtype):
        return ctypes.c_int64(DTYPES[argument])
    return ctypes.c_double(argument) if isinstance(argument, float) else ctypes.c_int64(argument)


_loaded: Library | None = None
_in_use = False


def use_native() -> None:
    """Compile if needed, load, and use the native kernels in this process from now on.

    Raises:
        BuildError: they cannot be compiled here; the plain kernels stay in use.
    """
    global _loaded, _in_use  # noqa: PLW0603 - one library a process
    if _loaded is None:
        _loaded = _load()
    _in_use = True


def _load() -> Library:
    try:
        return Library(build())
    except OSError as error:
        raise BuildError(f"the compiled library cannot be loaded: {error}") from error


def use_plain() -> None:
    """Use the plain PyTorch kernels in this process from now on."""
    global _in_use  # noqa: PLW0603
    _in_use = False


def choose_kernels(wanted: str) -> str:
    """Use the kernels that a recipe's `cluster.cpu_kernels` wants; what is in use then, in a few words.

    Args:
        wanted: `auto`, `native` or `plain`.

    Raises:
        UserError: native kernels are wanted and cannot be had.
    """
    use_plain()
    if wanted == "plain":
        return "plain PyTorch (cluster.cpu_kernels=plain)"
    try:
        use_native()
    except BuildError as error:
        if wanted == "native":
            raise UserError(f"cluster.cpu_kernels: native kernels cannot be had: {error}") from error
        return f"plain PyTorch, about half as fast as native: {error}"
    return "native"


@contextmanager
def implementation(name: str) -> Iterator[None]:
    """The `native` or the `plain` kernels inside, what was in use before afterwards."""
    before = _in_use
    use_native() if name == "native" else use_plain()
    try:
        yield
    finally:
        use_native() if before else use_plain()


def active(*tensors: Tensor | None) -> Library | None:
    """The library if it is in use and serves these tensors: on the CPU, of a dtype it knows."""
    if not _in_use:
        return None
    served = all(t is None or (t.device.type == "cpu" and t.dtype in DTYPES) for t in tensors)
    return _loaded if served else None


def in_use() -> str:
    """`native` or `plain`."""
    return "native" if _in_use else "plain"
