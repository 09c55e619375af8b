"""Mistakes that a layout can contain, each a patch inside a rank; the comparison with one rank must see every one.

A rank enters the context before it builds its model, when megatron-core has been adapted.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from functools import partial
from types import SimpleNamespace
from typing import Any
from unittest import mock

from tests.distributed.courses import Mistake


@contextmanager
def _with_changed_models(change: Callable[[Any], None]) -> Iterator[None]:
    """Models are changed when they have their weights, before the optimizer sees them."""
    from nano_pretrain.train.step import Trainable

    build = Trainable.__init__

    def build_changed(self: Any, recipe: Any, layout: Any, platform: Any, model: Any) -> None:
        change(model)
        build(self, recipe, layout, platform, model)

    with mock.patch.object(Trainable, "__init__", build_changed):
        yield


def outputs_not_summed() -> Any:
    """TP: each rank goes on with its part of an output's sum, and of an input's gradient."""
    return mock.patch("megatron.core.tensor_parallel.mappings._reduce", lambda part, group: part)


def input_gradients_not_summed() -> Any:
    """TP: each rank goes on with its part of the gradient of a linear's input; outputs are right."""
    from megatron.core.tensor_parallel import ColumnParallelLinear

    def change(model: Any) -> None:
        for module in model.modules():
            if isinstance(module, ColumnParallelLinear):
                module.allreduce_dgrad, module.disable_grad_reduce = False, True

    return _with_changed_models(change)


def unmarked_shards() -> Any:
    """TP: each rank's part of a weight is taken for a copy of the others'."""

    def change(model: Any) -> None:
        for parameter in model.parameters():
            parameter.tensor_model_parallel = False

    return _with_changed_models(change)


def unequal_copies() -> Any:
    """Any: the ranks' weights differ where they should be copies."""
    import torch
    import torch.distributed as dist

    def change(model: Any) -> None:
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.mul_(1 + 1e-5 * dist.get_rank())

    return _with_changed_models(change)


def unmarked_norms() -> Any:
    """SP: gradients of the norms are not summed over the ranks that share a sequence."""

    def change(model: Any) -> None:
        for parameter in model.parameters():
            parameter.sequence_parallel = False

    return _with_changed_models(change)


def gathered_in_another_order() -> Any:
    """SP: a linear gets the parts of the sequence in the wrong order."""
    from megatron.core.tensor_parallel import layers

    gather = layers.dist_all_gather_func

    def gather_wrongly(whole: Any, part: Any, group: Any, async_op: bool = False) -> Any:
        gather(whole, part, group=group)
        whole.copy_(whole.roll(part.shape[0], 0))
        return SimpleNamespace(wait=lambda: None)

    return mock.patch.object(layers, "dist_all_gather_func", gather_wrongly)


def sequence_gradients_not_summed() -> Any:
    """SP: the gradient of a part of the sequence is that of this rank's columns only."""
    from megatron.core.tensor_parallel import layers

    def keep_own(part: Any, whole: Any, group: Any, async_op: bool) -> Any:
        part.copy_(whole.chunk(group.size())[group.rank()])
        return SimpleNamespace(wait=lambda: None)

    return mock.patch.object(layers, "dist_reduce_scatter_func", keep_own)


def chunks_not_in_order() -> Any:
    """CP: attention takes the keys in the order in which the ranks hold them."""
    import torch

    from nano_pretrain.parallel.context import whole_sequence

    def as_held(own: Any, group: Any) -> Any:
        size = group.size()
        order = [chunk for rank in range(size) for chunk in (rank, 2 * size - 1 - rank)]
        chunks = whole_sequence(own, group).chunk(2 * size)
        return torch.cat([chunks[number] for number in order])

    return mock.patch("nano_pretrain.kernels.attention.whole_sequence", as_held)


def key_gradients_not_summed() -> Any:
    """CP: gradients of keys and values come from this rank's queries only."""
    from nano_pretrain.parallel import context

    def keep_own(ctx: Any, grad: Any) -> Any:
        return context.own_tokens(grad, 0, (ctx.group.rank(), ctx.group.size())), None

    return mock.patch.object(context._WholeSequence, "backward", staticmethod(keep_own))


def neighbouring_chunks() -> Any:
    """CP: a rank has two chunks that follow one another."""

    def follow(whole: Any, dim: int, place: tuple[int, int]) -> Any:
        return whole.chunk(place[1], dim)[place[0]]

    return mock.patch("nano_pretrain.data.loader.own_tokens", follow)


def scan_not_in_order() -> Any:
    """CP: convolution and scan take the tokens in the order in which the ranks hold them."""
    from megatron.core.ssm import mamba_context_parallel

    def keep(part: Any, size: int, packed: Any) -> Any:
        return part

    return mock.patch.multiple(
        mamba_context_parallel, _undo_attention_load_balancing=keep, _redo_attention_load_balancing=keep
    )


def loss_times_context_ranks() -> Any:
    """CP: a loss function that returns two values, which megatron-core multiplies by the context-parallel ranks.

    Without context parallelism it is the right loss: the mean of equal micro-batches is the mean of their means.
    """
    import torch
    from megatron.core import parallel_state

    def of_two_values(batch: Any, score: Any, losses: Any) -> Any:
        ranks = parallel_state.get_data_parallel_world_size(with_context_parallel=True)
        return losses.mean() / ranks, (losses.detach().sum(), torch.tensor(losses.numel()))

    return mock.patch("nano_pretrain.train.step._loss", of_two_values)


def positions_swapped() -> Any:
    """PP: the last position computes the first layers."""
    from nano_pretrain.model import layers, stack

    def select(self: Any, types: list[str]) -> tuple[int, list[str]]:
        position = self.pp_group.size() - 1 - self.pp_group.rank()
        first = right(self.split, position)
        return first, types[first : first + self.split[position]]

    right = stack.first_layer
    patches = ExitStack()
    patches.enter_context(mock.patch.object(stack.HybridStack, "_select_layers_for_pipeline_parallel", select))
    patches.enter_context(
        mock.patch.object(layers, "first_layer", lambda split, position: right(split, len(split) - 1 - position))
    )
    return patches


def offset_of_an_equal_split() -> Any:
    """PP: attention and feed-forward layers are numbered as megatron-core divides the layers."""
    from megatron.core.transformer.transformer_layer import TransformerLayer

    from nano_pretrain.model.stack import PlacedTransformerLayer

    def build(self: Any, *arguments: Any, first_layer: int, **others: Any) -> None:
        TransformerLayer.__init__(self, *arguments, **others)

    return mock.patch.object(PlacedTransformerLayer, "__init__", build)


def gradients_not_reduced() -> Any:
    """DP: each rank updates its part of the weights with its own gradient."""
    from megatron.core.distributed.param_and_grad_buffer import _ParamAndGradBucketGroup

    def start(self: Any, force_all_reduce: bool = False) -> None:
        self.grad_reduce_handle = SimpleNamespace(wait=lambda: None)

    return mock.patch.object(_ParamAndGradBucketGroup, "start_grad_sync", start)


def gathers_end_late() -> Any:
    """No mistake: what is gathered and reduced in the background arrives when it is waited for, and not before.

    Gloo moves these few bytes at once, which hides who does not wait.
    """
    from megatron.core.distributed import param_and_grad_buffer as buffer

    calls: list[Callable[[], Any]] = []

    @contextmanager
    def together(group: Any, async_ops: bool) -> Iterator[Any]:
        calls.clear()
        handle = SimpleNamespace()
        yield handle
        mine = list(calls)
        handle.wait = lambda: [call() for call in mine]
        if not async_ops:
            handle.wait()

    def later(function: Any) -> Any:
        return lambda *tensors, async_op, **others: calls.append(partial(function, *tensors, **others))

    return mock.patch.multiple(
        buffer,
        _coalescing_manager=together,
        dist_all_gather_func=later(buffer.dist_all_gather_func),
        dist_reduce_scatter_func=later(buffer.dist_reduce_scatter_func),
    )


def same_samples() -> Any:
    """DP: all ranks read the samples of the first."""
    from nano_pretrain.data.loader import BatchReader

    build = BatchReader.__init__

    def build_first(self: Any, corpus: Any, curriculum: Any, place: tuple[int, int], *others: Any) -> None:
        build(self, corpus, curriculum, (0, place[1]), *others)

    return mock.patch.object(BatchReader, "__init__", build_first)


def convolution_not_waited_for() -> Any:
    """DP with overlap: a mixer reads its convolution's weights before they are gathered."""
    patches = ExitStack()
    patches.enter_context(gathers_end_late())
    patches.enter_context(mock.patch("nano_pretrain.train.step._gather_what_mixers_read", return_value=None))
    return patches


def saved_before_gathered() -> Any:
    """DP with overlap: a checkpoint holds the weights that the forward pass has yet to bring up to date."""
    from nano_pretrain.train.step import Trainable

    return mock.patch.object(Trainable, "gather_parameters", return_value=None)


def padding_not_left_out() -> Any:
    """DP with several buckets: moments are saved from where they would be in a buffer with padding."""
    return mock.patch("nano_pretrain.checkpoint.sharded._places_without_padding", return_value=nullcontext())


MISTAKES: dict[Mistake, tuple[str, str]] = {
    outputs_not_summed: ("TP2", "losses"),
    input_gradients_not_summed: ("TP2", "gradients"),
    unmarked_shards: ("TP2", "gradient norms"),
    unmarked_norms: ("TP2 with SP", "gradients"),
    gathered_in_another_order: ("TP2 with SP", "losses"),
    sequence_gradients_not_summed: ("TP2 with SP", "gradients"),
    chunks_not_in_order: ("CP2", "losses"),
    key_gradients_not_summed: ("CP2", "gradients"),
    neighbouring_chunks: ("CP2", "samples"),
    scan_not_in_order: ("CP2", "losses"),
    loss_times_context_ranks: ("CP2", "gradients"),
    positions_swapped: ("PP2", "losses"),
    gradients_not_reduced: ("DP2", "gradients"),
    same_samples: ("DP2", "samples"),
    unequal_copies: ("DP2, replicated", "copies"),
    convolution_not_waited_for: ("DP2, many buckets", "losses"),
    saved_before_gathered: ("DP2", "weights"),
    padding_not_left_out: ("DP2, many buckets", "moments"),
}
"""Where each is made, and one of the comparisons that see it."""
