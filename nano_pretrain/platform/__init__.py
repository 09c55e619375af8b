"""What differs between a CPU and a GPU: device, backend, kernels, layer modules, and what megatron-core needs there."""

from nano_pretrain.platform.base import Platform

__all__ = ["Platform", "current_platform"]


def current_platform() -> Platform:
    """The platform of this process: CUDA where torch sees a device, else the CPU; megatron-core is ready to import after it."""
    import torch

    if torch.cuda.is_available():
        from nano_pretrain.platform.cuda import CudaPlatform

        return CudaPlatform()
    from nano_pretrain.platform.cpu import CpuPlatform

    return CpuPlatform()
