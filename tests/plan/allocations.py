"""Bytes of all tensors that live, followed through every operator."""

from __future__ import annotations

import weakref
from typing import Any

from torch import Tensor, UntypedStorage
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class LiveTensors(TorchDispatchMode):
    """Bytes of the storages that operators gave since the mode was first entered and that something still holds.

    A storage counts once, however many tensors view it, and with its present size: recomputation empties storages
    without an operator. What an operator allocates and frees inside itself is not seen.

    Attributes:
        live: bytes after the last operator.
        peak: the largest `live` since it was last set.
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._storages: dict[int, weakref.ref[UntypedStorage]] = {}
        self.live = 0
        self.peak = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run the operator and count."""
        result = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            if isinstance(leaf, Tensor):
                self._watch(leaf.untyped_storage())
        self.count()
        return result

    def count(self) -> int:
        """Live bytes now."""
        held = (reference() for reference in list(self._storages.values()))
        self.live = sum(storage.nbytes() for storage in held if storage is not None)
        self.peak = max(self.peak, self.live)
        return self.live

    def _watch(self, storage: UntypedStorage) -> None:
        key = storage._cdata
        if key not in self._storages:
            self._storages[key] = weakref.ref(storage, lambda _: self._storages.pop(key, None))
