"""What one rank sends: the collectives of megatron-core 0.16 for each layer type, in bytes, and how long they take.

With n ranks in a group and T bytes in the whole tensor a rank sends (n-1)/n T in an all-gather or reduce-scatter, twice
as much in an all-reduce, and (n-1)/n of its own tensor in an all-to-all; it receives the same. Without latencies.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from nano_pretrain.plan.buffers import GRADIENT_BYTES, storage_of
from nano_pretrain.plan.device import Device
from nano_pretrain.plan.ranks import Part, rank_tensors
from nano_pretrain.plan.work import BYTES, RankWork
from nano_pretrain.recipe.derived import mamba_shape
from nano_pretrain.recipe.pattern import LayerType
from nano_pretrain.recipe.schema import ParallelConfig, Recipe

INTO = {LayerType.MAMBA: "in_proj", LayerType.FEED_FORWARD: "linear_fc1", LayerType.ATTENTION: "linear_qkv"}
"""Name of the column-parallel linear of a layer type."""


@dataclass(frozen=True)
class Group:
    """Ranks that exchange something.

    Attributes:
        size: how many.
        stride: distance between their global ranks.
    """

    size: int
    stride: int

    def in_node(self, devices_per_node: int) -> int:
        """Members that share a node, the first rank's node taken for all."""
        return max(1, min(self.size, devices_per_node // self.stride))


def groups(layout: ParallelConfig, data_parallel: int) -> dict[str, Group]:
    """megatron-core's groups; ranks are numbered tensor first, then context, data, pipeline.

    `data` holds the context-parallel ranks too: they hold the same parameters.
    """
    model = layout.tensor * layout.context
    return {
        "tensor": Group(layout.tensor, 1),
        "context": Group(layout.context, layout.tensor),
        "data": Group(layout.context * data_parallel, layout.tensor),
        "pipeline": Group(layout.pipeline, model * data_parallel),
    }


NORMS = frozenset({"norm.weight", "input_layernorm.weight", "pre_mlp_layernorm.weight", "final_norm.weight"})
"""Names of the residual stream's norms, in `plan.ranks`."""

BETWEEN_NEIGHBOURS = ("context keys and values", "pipeline send")
"""Kinds of transfers that are no collectives."""


@dataclass(frozen=True)
class Transfer:
    """One collective, seen from one rank.

    Attributes:
        kind: name in tables, for example `tensor all-gather`; its first word is the group.
        bytes: sent by the rank.
        behind: name of the kernel that runs meanwhile, or None where the rank waits.
    """

    kind: str
    bytes: float
    behind: str | None = None

    @property
    def group(self) -> str:
        """Key of `groups`."""
        return self.kind.partition(" ")[0]

    def seconds(self, group: Group, device: Device) -> float:
        """Time at the bandwidths of the device.

        Within a node everything goes over its links. Beyond, a collective in a ring crosses the border of a node once
        for all members in it, which share their network adapters; an all-to-all crosses it once for each of them; and
        between neighbours that send to each other the rank at the border sends all of its own over one adapter.
        """
        if group.size == 1 or not self.bytes:
            return 0.0
        near = group.in_node(device.devices_per_node)
        if near == group.size:
            outside = 0.0
        elif self.kind in BETWEEN_NEIGHBOURS:
            outside = 1.0
        elif self.kind.endswith("all-to-all"):
            outside = (group.size - near) / (group.size - 1)
        else:
            outside = 1 / near
        return max(self.bytes / device.link_rate, self.bytes * outside / device.network_rate)


@dataclass(frozen=True)
class Transfers:
    """Of one micro-batch, in the forward and in the backward pass."""

    forward: tuple[Transfer, ...] = ()
    backward: tuple[Transfer, ...] = ()

    def __add__(self, other: Transfers) -> Transfers:
        return Transfers(self.forward + other.forward, self.backward + other.backward)


def sum_by_kind(transfers: Iterable[Transfer]) -> dict[str, float]:
    """Bytes by kind."""
    found: dict[str, float] = {}
    for transfer in transfers:
        found[transfer.kind] = found.get(transfer.kind, 0.0) + transfer.bytes
    return found


def layer_transfers(work: RankWork, kind: LayerType, number_format: str, sequence_parallel: bool) -> Transfers:
    """Of one layer: around its two linears, and for context parallelism between them."""
    found = _into(work, INTO[kind], number_format, sequence_parallel) + _out(work, number_format, sequence_parallel)
    if work.context == 1:
        return found
    return found + {
        LayerType.MAMBA: _heads_for_tokens,
        LayerType.ATTENTION: _keys_and_values,
        LayerType.FEED_FORWARD: _nothing,
    }[kind](work)


def embedding_transfers(work: RankWork, sequence_parallel: bool) -> Transfers:
    """VocabParallelEmbedding: a sum over the ranks that hold parts of the table."""
    return _out(work, work.activation, sequence_parallel)


def head_transfers(work: RankWork, sequence_parallel: bool) -> Transfers:
    """The output head, and three FP32 numbers for each token in vocab_parallel_cross_entropy."""
    numbers = _ring(work.tensor, 3 * work.tokens * BYTES["fp32"])
    sums = Transfers(forward=(Transfer("tensor all-reduce", 2 * numbers),)) if work.tensor > 1 else Transfers()
    return _into(work, "head", work.activation, sequence_parallel) + sums


def _ring(size: int, whole: float) -> float:
    """Bytes a rank sends in an all-gather or reduce-scatter of `whole` bytes."""
    return (size - 1) / size * whole


def _residual(work: RankWork, number_format: str) -> float:
    """Bytes a rank sends when the residual stream is gathered or reduced over the tensor-parallel ranks.

    Transformer Engine casts to FP8 before it gathers; the CPU's linears do not.
    """
    width = BYTES[number_format] if work.platform == "cuda" else work.width
    return _ring(work.tensor, work.tokens * work.model.hidden_size * width)


def _into(work: RankWork, name: str, number_format: str, sequence_parallel: bool) -> Transfers:
    """ColumnParallelLinear (LinearWithGradAccumulationAndAsyncCommunication).

    With sequence parallelism the input is gathered forward, and again backward while the gradient of the input is
    computed, which is then scattered while the gradient of the weight is computed. Without, that gradient is reduced
    in the same place.
    """
    if work.tensor == 1:
        return Transfers()
    reduced = _residual(work, work.activation)
    if not sequence_parallel:
        return Transfers(backward=(Transfer("tensor all-reduce", 2 * reduced, f"{name} wgrad"),))
    gathered = _residual(work, number_format)
    return Transfers(
        forward=(Transfer("tensor all-gather", gathered),),
        backward=(
            Transfer("tensor all-gather", gathered, f"{name} dgrad"),
            Transfer("tensor reduce-scatter", reduced, f"{name} wgrad"),
        ),
    )


def _out(work: RankWork, number_format: str, sequence_parallel: bool) -> Transfers:
    """RowParallelLinear: its output is reduced forward; with sequence parallelism its gradient is gathered backward."""
    if work.tensor == 1:
        return Transfers()
    reduced = _residual(work, work.activation)
    if not sequence_parallel:
        return Transfers(forward=(Transfer("tensor all-reduce", 2 * reduced),))
    return Transfers(
        forward=(Transfer("tensor reduce-scatter", reduced),),
        backward=(Transfer("tensor all-gather", _residual(work, number_format)),),
    )


def _nothing(_work: RankWork) -> Transfers:
    return Transfers()


def _heads_for_tokens(work: RankWork) -> Transfers:
    """MambaContextParallel: z, x, B, C and dt from some tokens of all heads to all tokens of some heads, y back.

    Where there are fewer groups than ranks, B and C are repeated before they are sent.
    """
    model, inner = work.model, mamba_shape(work.model).inner // work.tensor
    groups_sent = max(model.mamba_num_groups // work.tensor, work.context)
    sent = 2 * inner + 2 * groups_sent * model.mamba_state_dim + model.mamba_num_heads // work.tensor
    moved = _ring(work.context, work.tokens * (sent + inner) * work.width)
    both = (Transfer("context all-to-all", moved),)
    return Transfers(both, both)


def _keys_and_values(work: RankWork) -> Transfers:
    """Keys and values of all ranks, and gradients for them.

    On a GPU a ring (Transformer Engine's cp_comm_type p2p), which runs behind the attention to the part that has
    arrived, backward also of the gradients. On a CPU they are gathered, and their gradients scattered in FP32.
    """
    keys = work.model.num_query_groups * work.model.head_dim // work.tensor
    elements = (work.context - 1) * work.tokens * 2 * keys
    moved = elements * work.width
    if work.platform == "cpu":
        return Transfers(
            (Transfer("context all-gather of keys and values", moved),),
            (Transfer("context reduce-scatter of their gradients", elements * BYTES["fp32"]),),
        )
    return Transfers(
        (Transfer("context keys and values", moved, "attention"),),
        (Transfer("context keys and values", 2 * moved, "attention"),),
    )


def pipeline_transfers(work: RankWork, part: Part, positions: int) -> tuple[Transfer, ...]:
    """The residual stream to the next position and its gradient to the one before, of one micro-batch."""
    sent = Transfer("pipeline send", work.residual_tokens * work.model.hidden_size * work.width)
    return (sent,) * ((part.position < positions - 1) + (part.position > 0))


def step_transfers(
    recipe: Recipe, layout: ParallelConfig, part: Part, platform: str, data: int
) -> tuple[Transfer, ...]:
    """Once a step: gradients in FP32, and parameters as they are held, over `data` ranks.

    With the distributed optimizer (ParamAndGradBuffer) gradients are scattered and parameters gathered, FP8 weights in
    FP8 (fp8_param_gather); without it gradients are reduced. With sequence parallelism the gradients of the residual
    stream's norms are reduced over the tensor-parallel ranks (finalize_model_grads).
    """
    tensors = rank_tensors(recipe.model, layout, part)
    norms = sum(tensor.elements for tensor in tensors if tensor.name in NORMS)
    shared = _ring(layout.tensor, GRADIENT_BYTES * norms) if layout.sequence else 0.0
    gradients = _ring(data, GRADIENT_BYTES * sum(tensor.elements for tensor in tensors))
    gathered = _ring(data, parameter_bytes(recipe, layout, part, platform))
    found = [Transfer("tensor all-reduce of gradients", 2 * shared)]
    if layout.distributed_optimizer:
        found += [
            Transfer("data reduce-scatter of gradients", gradients),
            Transfer("data all-gather of parameters", gathered),
        ]
    else:
        found.append(Transfer("data all-reduce of gradients", 2 * gradients))
    return tuple(transfer for transfer in found if transfer.bytes)


def parameter_bytes(recipe: Recipe, layout: ParallelConfig, part: Part, platform: str) -> int:
    """Bytes of a rank's parameters as they are held, without padding."""
    return sum(
        tensor.elements * storage_of(tensor, recipe.model, recipe.precision, platform == "cuda")
        for tensor in rank_tensors(recipe.model, layout, part)
    )
