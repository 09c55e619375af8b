"""What differs between a CPU and a GPU: device, backend, kernels, layer modules, and what megatron-core needs there."""

import warnings

from nano_pretrain.platform.base import Platform

__all__ = ["Platform", "current_platform"]


def current_platform() -> Platform:
    """The platform of this process: CUDA where torch sees a device, else the CPU."""
    import torch

    _silence_known_warnings()
    if torch.cuda.is_available():
        from nano_pretrain.platform.cuda import CudaPlatform

        return CudaPlatform()
    from nano_pretrain.platform.cpu import CpuPlatform

    return CpuPlatform()


def _silence_known_warnings() -> None:
    """Warnings that are megatron-core's to mend and tell a user nothing."""
    # Missing extras it looks for, options of its own that it deprecates.
    warnings.filterwarnings("ignore", module="megatron")
    # Collectives and checkpoint functions it calls by names that torch 2.13 has renamed.
    warnings.filterwarnings("ignore", category=FutureWarning, module="torch.distributed")
    # Its distributed optimizer looks for gradients on the views that its shards are.
    warnings.filterwarnings("ignore", message="The .grad attribute of a Tensor that is not a leaf")
