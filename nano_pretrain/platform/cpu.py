"""megatron-core on a machine without CUDA: every adaptation it needs, each with its reason.

Nothing here is applied where CUDA exists, and nothing outside `megatron.core` is changed for good: its modules get a
view of torch in which the CUDA device is the CPU, and the few names it imports from mamba-ssm, Transformer Engine and
apex are set to portable ones. `ADAPTATIONS` lists them; tests/platform/test_cpu.py shows that each is still needed
and still fits megatron-core 0.16.
"""

from __future__ import annotations

import ctypes
import importlib
import logging
import os
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from types import ModuleType
from typing import Any

import psutil
import torch
from torch import nn

from nano_pretrain.kernels.native.library import choose_kernels
from nano_pretrain.platform.base import LayerModules, Memory, PlatformName
from nano_pretrain.platform.products import use_onednn_for_fp32
from nano_pretrain.recipe.rules_gpu import refuse_on_cpu
from nano_pretrain.recipe.schema import ParallelConfig, Recipe

MODULES = (
    "megatron.core",
    "megatron.core.parallel_state",
    "megatron.core.tensor_parallel",
    "megatron.core.pipeline_parallel.schedules",
    "megatron.core.distributed",
    "megatron.core.distributed.finalize_model_grads",
    "megatron.core.distributed.param_and_grad_buffer",
    "megatron.core.fusions.fused_bias_dropout",
    "megatron.core.optimizer",
    "megatron.core.dist_checkpointing",
    "megatron.core.dist_checkpointing.strategies.async_utils",
    "megatron.core.dist_checkpointing.strategies.filesystem_async",
    "megatron.core.dist_checkpointing.strategies.fully_parallel",
    "megatron.core.dist_checkpointing.strategies.state_dict_saver",
    "megatron.core.dist_checkpointing.strategies.torch",
    "megatron.core.models.mamba.mamba_model",
    "megatron.core.ssm.mamba_block",
    "megatron.core.ssm.mamba_layer",
    "megatron.core.ssm.mamba_mixer",
    "megatron.core.transformer.attention",
    "megatron.core.inference.contexts",
)
"""Parts of megatron-core that are used; imported before the adaptations so that these reach them."""

_FACTORIES = ("tensor", "zeros", "ones", "empty", "full", "zeros_like", "ones_like", "empty_like")


class _CpuStream:
    """Inert stand-in for a CUDA stream: all work on the CPU is in order."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        """Accept what `torch.cuda.Stream` accepts."""

    def wait_stream(self, stream: object) -> None:
        """Nothing to wait for."""

    def synchronize(self) -> None:
        """Nothing to wait for."""


class _CpuAsCuda(ModuleType):
    """`torch.cuda` as megatron-core shall see it."""

    Stream = _CpuStream

    def __init__(self) -> None:
        super().__init__("torch.cuda")
        # A generator of its own: megatron-core seeds and saves "the CUDA RNG", and the CPU's must not move with it.
        self._generator = torch.Generator()

    def __getattr__(self, name: str) -> Any:
        return getattr(torch.cuda, name)

    @property
    def random(self) -> _CpuAsCuda:
        """`torch.cuda.random` has the same RNG functions."""
        return self

    def current_device(self) -> torch.device:
        """The CPU, where megatron-core asks for the device to allocate on."""
        return torch.device("cpu")

    def synchronize(self, device: object = None) -> None:
        """Nothing to wait for."""

    def empty_cache(self) -> None:
        """No caching allocator."""

    def current_stream(self, device: object = None) -> _CpuStream:
        """The one order of work there is."""
        return _CpuStream()

    default_stream = current_stream

    def get_rng_state(self, device: object = "cuda") -> torch.Tensor:
        """State of the stand-in generator."""
        return self._generator.get_state()

    def set_rng_state(self, state: torch.Tensor, device: object = "cuda") -> None:
        """Set the state of the stand-in generator."""
        self._generator.set_state(state)

    def manual_seed(self, seed: int) -> None:
        """Seed the stand-in generator."""
        self._generator.manual_seed(seed)


class _CpuTorch(ModuleType):
    """`torch` as megatron-core shall see it: literal device="cuda" gives CPU tensors, `torch.cuda` is the CPU."""

    def __init__(self) -> None:
        super().__init__("torch")
        self.cuda = _CpuAsCuda()
        for name in _FACTORIES:
            setattr(self, name, _on_cpu(getattr(torch, name)))

    def __getattr__(self, name: str) -> Any:
        return getattr(torch, name)


def _on_cpu(factory: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    def create(*args: Any, **kwargs: Any) -> torch.Tensor:
        if str(kwargs.get("device", "")).startswith("cuda"):
            kwargs["device"] = "cpu"
        return factory(*args, **kwargs)

    return create


def view_torch(view: ModuleType) -> None:
    """Device names: megatron-core allocates with device="cuda" and `torch.cuda.current_device()` throughout."""
    for name, module in list(sys.modules.items()):
        if name.startswith("megatron.core") and module.__dict__.get("torch") is torch:
            module.__dict__["torch"] = view


def rng_setter(view: ModuleType) -> None:
    """RNG tracker: `_set_cuda_rng_state` leaves its work to the start of CUDA, which never comes: the work piles up."""
    random = importlib.import_module("megatron.core.tensor_parallel.random")

    def set_state(new_state: torch.Tensor, device: int = -1, graph_safe: bool = False) -> None:
        view.cuda.set_rng_state(new_state)

    random.__dict__["_set_cuda_rng_state"] = set_state
    # The tracker warns when the CPU generator moves inside `fork`; on a CPU module constructors draw from it, and every
    # weight is initialised afterwards from its own seed (model/initialisation.py).
    logging.getLogger(random.__name__).setLevel(logging.ERROR)


def mamba_kernels(view: ModuleType) -> None:
    """Mamba-2 kernels: the mixer imports mamba-ssm's, which need CUDA, and refuses to be built without them."""
    from nano_pretrain.kernels import mamba

    mixer = importlib.import_module("megatron.core.ssm.mamba_mixer")

    mixer.__dict__.update(
        HAVE_MAMBA_SSM=True,
        ExtendedRMSNorm=_shardable_norm(mamba.GatedRMSNorm),
        mamba_split_conv1d_scan_combined=mamba.mamba_split_conv1d_scan_combined,
        mamba_chunk_scan_combined=mamba.mamba_chunk_scan_combined,
        selective_state_update=mamba.selective_state_update,
    )


def _shardable_norm(base: type[nn.Module]) -> type[nn.Module]:
    """Megatron-core's class of this name derives from mamba-ssm's norm, so without mamba-ssm from a mock."""
    from megatron.core.parallel_state import get_tensor_model_parallel_group
    from megatron.core.transformer.utils import make_sharded_tensors_for_checkpoint

    class ExtendedRMSNorm(base):  # type: ignore[misc,valid-type]
        """Gated norm whose weight is sharded over the tensor-parallel ranks."""

        def sharded_state_dict(
            self, prefix: str = "", sharded_offsets: tuple[Any, ...] = (), metadata: dict[str, Any] | None = None
        ) -> Any:
            """The weight, sharded along axis 0."""
            return make_sharded_tensors_for_checkpoint(
                self.state_dict(prefix="", keep_vars=True),
                prefix,
                {"weight": 0},
                sharded_offsets,
                tp_group=get_tensor_model_parallel_group(),
                dp_cp_group=(metadata or {}).get("dp_cp_group"),
            )

    return ExtendedRMSNorm


def final_norm(view: ModuleType) -> None:
    """Final norm: `MambaStack` names Transformer Engine's norm itself instead of taking it from the layer spec."""
    from nano_pretrain.kernels.norm import RMSNorm

    importlib.import_module("megatron.core.ssm.mamba_block").__dict__["TENorm"] = RMSNorm


def fused_adam(view: ModuleType) -> None:
    """Adam: with torch's AdamW the distributed optimizer's resume is broken: `step` is state of a parameter there."""
    from nano_pretrain.kernels.adam import FusedAdam

    package = importlib.import_module("megatron.core.optimizer")
    package.__dict__.update(Adam=FusedAdam, USING_PYTORCH_OPTIMIZER=False)
    distributed = importlib.import_module("megatron.core.optimizer.distrib_optimizer")
    distributed.__dict__.update(Adam=FusedAdam, HAVE_APEX_OR_TE=True, USING_APEX_OPTIMIZER=True)


def lone_ranks(view: ModuleType) -> None:
    """A data-parallel group of one rank: gloo copies all gradients, and all parameters, onto themselves."""
    buffers = importlib.import_module("megatron.core.distributed.param_and_grad_buffer")
    for name in ("dist_reduce_scatter_func", "dist_all_gather_func"):
        buffers.__dict__[name] = _unless_alone(buffers.__dict__[name])


def _unless_alone(collective: Callable[..., Any]) -> Callable[..., Any]:
    """A collective between a buffer and this rank's part of it; of one rank that is the buffer."""

    def call(output: torch.Tensor, source: torch.Tensor, *, group: Any, **kwargs: Any) -> Any:
        return None if group.size() == 1 else collective(output, source, group=group, **kwargs)

    return call


ADAPTATIONS: tuple[Callable[[ModuleType], None], ...] = (
    view_torch,
    rng_setter,
    mamba_kernels,
    final_norm,
    fused_adam,
    lone_ranks,
)
"""Applied once per process, in order; `CpuPlatform.optimizer_scope` is the one that is applied only for a while."""

_applied: list[ModuleType] = []


def adapt_megatron() -> None:
    """Apply every adaptation, once."""
    if _applied:
        return
    # Its torch.compile decorators would load a compiler at import; none of the decorated functions is on this path.
    os.environ.setdefault("TORCHDYNAMO_DISABLE", "1")
    with warnings.catch_warnings():
        # "Transformer Engine and Apex are not installed": that is the point.
        warnings.simplefilter("ignore")
        for name in MODULES:
            importlib.import_module(name)
    view = _CpuTorch()
    for adaptation in ADAPTATIONS:
        adaptation(view)
    _applied.append(view)


@contextmanager
def tensors_as_cuda() -> Iterator[None]:
    """Tensors: the optimizers compare `Tensor.type()` with torch.cuda.FloatTensor, and call `Tensor.cuda()`."""
    original_type, original_cuda = torch.Tensor.type, torch.Tensor.cuda

    def type_name(tensor: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        answer = original_type(tensor, *args, **kwargs)
        return answer.replace("torch.", "torch.cuda.", 1) if isinstance(answer, str) else answer

    def stay(tensor: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        return tensor

    torch.Tensor.type, torch.Tensor.cuda = type_name, stay  # type: ignore[method-assign,assignment]
    try:
        yield
    finally:
        torch.Tensor.type, torch.Tensor.cuda = original_type, original_cuda  # type: ignore[method-assign]


def keep_freed_memory() -> None:
    """Let glibc keep what is freed: it maps large blocks one by one, and every step would fault them in again."""
    libc = ctypes.CDLL(None)
    if hasattr(libc, "mallopt"):
        libc.mallopt(_M_MMAP_MAX, 0)
        libc.mallopt(_M_TRIM_THRESHOLD, -1)


_M_TRIM_THRESHOLD, _M_MMAP_MAX = -1, -4  # malloc.h


def _local_ranks() -> int:
    """Ranks on this machine, as torchrun and `launch` set them."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", "1"))


class CpuPlatform:
    """Gloo and portable kernels."""

    name: PlatformName = "cpu"
    backend = "gloo"

    def __init__(self) -> None:
        self._kernels = "plain"

    def memory(self, local_rank: int) -> Memory:
        """The machine's, without swap, for all ranks on it."""
        return Memory("this machine", psutil.virtual_memory().total, _local_ranks())

    def prepare(self, local_rank: int, threads: int | None, kernels: str = "auto") -> torch.device:
        """Set the thread count, flush denormals, choose the kernels, adapt megatron-core."""
        # Decay products underflow; without flushing, denormals make the scan up to 2.5 times slower. Before any
        # parallel region.
        torch.set_flush_denormal(True)
        torch.set_num_threads(threads or max(1, len(os.sched_getaffinity(0)) // _local_ranks()))
        keep_freed_memory()
        use_onednn_for_fp32()
        self._kernels = choose_kernels(kernels)
        adapt_megatron()
        return torch.device("cpu")

    def kernels(self) -> str:
        """`native`, or `plain` and more words that say why."""
        return self._kernels

    def layer_modules(self) -> LayerModules:
        """megatron-core's tensor-parallel linears with separate norms, and our attention."""
        from megatron.core.tensor_parallel import ColumnParallelLinear, RowParallelLinear

        from nano_pretrain.kernels.attention import CausalAttention
        from nano_pretrain.kernels.norm import RMSNorm

        return LayerModules(ColumnParallelLinear, RowParallelLinear, RMSNorm, CausalAttention)

    def prepare_model(self, recipe: Recipe, layout: ParallelConfig) -> dict[str, Any]:
        """Switch off what needs CUDA kernels; `batch_p2p_comm` is right for gloo, its synchronisation is not needed."""
        refuse_on_cpu(recipe, layout)
        return {
            "gradient_accumulation_fusion": False,
            "bias_dropout_fusion": False,
            "masked_softmax_fusion": False,
            "persist_layer_norm": False,
            "batch_p2p_sync": False,
        }

    def optimizer_scope(self) -> AbstractContextManager[None]:
        """See `tensors_as_cuda`."""
        return tensors_as_cuda()

    def peak_flops(self, dtype: torch.dtype) -> float | None:
        """Best of a few 1024-cubed matrix products on this rank's threads."""
        left = torch.ones(1024, 1024, dtype=dtype)
        best = float("inf")
        for _ in range(6):
            start = time.perf_counter()
            left @ left
            best = min(best, time.perf_counter() - start)
        return 2 * 1024**3 / best

    def synchronize(self) -> None:
        """Nothing to wait for."""
