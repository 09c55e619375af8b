"""One optimizer step on megatron-core's forward-backward function."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig, finalize_model_grads
from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer
from megatron.core.optimizer.optimizer_config import ParamKey, ParamWithNamePredicate
from megatron.core.pipeline_parallel import get_forward_backward_func
from torch import Tensor, nn

from nano_pretrain.data.loader import MicroBatch
from nano_pretrain.model.hybrid import KEPT_FP32, HybridModel
from nano_pretrain.model.layers import DocumentMixer
from nano_pretrain.parallel.groups import reports_loss
from nano_pretrain.platform import Platform
from nano_pretrain.recipe.schema import ParallelConfig, Recipe


@dataclass(frozen=True)
class StepResult:
    """What a step reports, equal on all ranks.

    Args:
        loss: mean loss of the global batch, nats per token.
        grad_norm: global gradient norm before clipping.
        stop: whether any rank was asked to stop.
    """

    loss: float
    grad_norm: float
    stop: bool


class Trainable:
    """The model in its data-parallel wrapper, and its optimizer.

    Args:
        recipe: the recipe.
        layout: layout of the process groups.
        platform: the platform.
        model: this rank's part of the model.
    """

    def __init__(self, recipe: Recipe, layout: ParallelConfig, platform: Platform, model: HybridModel) -> None:
        self.model = model
        self.recipe = recipe
        self.platform = platform
        config: Any = model.config
        reduction = DistributedDataParallelConfig(
            grad_reduce_in_fp32=True,
            use_distributed_optimizer=layout.distributed_optimizer,
            overlap_grad_reduce=layout.overlap,
            overlap_param_gather=layout.overlap and layout.distributed_optimizer,
            bucket_size=layout.bucket_size,
            fp8_param_gather=config.fp8_param,
        )
        self.wrapped = DistributedDataParallel(config, reduction, model)
        if self.wrapped.use_forward_hook:
            _gather_what_mixers_read(self.wrapped)
        with platform.optimizer_scope():
            self.optimizer: Any = get_megatron_optimizer(
                _optimizer_config(recipe, layout, config),
                [self.wrapped],
                config_overrides=_without_decay(config.params_dtype),
                use_gloo_process_groups=platform.backend != "gloo",
            )
        config.no_sync_func = self.wrapped.no_sync
        config.finalize_model_grads_func = finalize_model_grads
        self._forward_backward = get_forward_backward_func()

    def step(
        self, batches: Iterator[MicroBatch], micro_batches: int, shape: tuple[int, int], lr: float, stop: bool
    ) -> StepResult:
        """Forward, backward, clip, update.

        Args:
            batches: this rank's micro-batches of the step.
            micro_batches: how many there are.
            shape: (sequence length, micro-batch size).
            lr: learning rate.
            stop: whether this rank was asked to stop.
        """
        self.wrapped.zero_grad_buffer()
        self.optimizer.zero_grad()
        sums = self.run(batches, micro_batches, shape, forward_only=False)
        self._set_hyperparameters(lr)
        with self.platform.optimizer_scope():
            _, grad_norm, _ = self.optimizer.step()
        loss_sum, tokens = (sum(part[i] for part in sums) for i in (0, 1))
        totals = torch.tensor([float(loss_sum), float(tokens), float(stop)], dtype=torch.float64)
        if not reports_loss():
            totals[:2] = 0
        totals = totals.to(next(self.model.parameters()).device)
        dist.all_reduce(totals)
        return StepResult(float(totals[0] / totals[1]), float(grad_norm), bool(totals[2] > 0))

    def run(
        self, batches: Iterator[Any], micro_batches: int, shape: tuple[int, int], forward_only: bool, score: Any = None
    ) -> list[Any]:
        """megatron-core's schedule over `micro_batches` of this rank.

        Args:
            batches: micro-batches.
            micro_batches: how many to take.
            shape: (sequence length, micro-batch size).
            forward_only: no backward pass.
            score: (batch, loss of each token [batch, length]) -> what to report instead of the summed loss.

        Returns:
            What each micro-batch reported, on the last pipeline stage; (loss sum in nats, tokens) without `score`.
        """
        result: list[Any] = self._forward_backward(
            forward_step_func=partial(_forward_step, score=score),
            data_iterator=batches,
            model=[self.wrapped],
            num_microbatches=micro_batches,
            seq_length=shape[0],
            micro_batch_size=shape[1],
            forward_only=forward_only,
        )
        return result

    def gather_parameters(self) -> None:
        """Bring the weights of all ranks up to date, where the next forward pass would do it layer by layer."""
        if self.wrapped.use_forward_hook:
            self.wrapped.start_param_sync(force_sync=True)

    def _set_hyperparameters(self, lr: float) -> None:
        # Weight decay is constant here; megatron-core's own scheduler would overwrite it with its start and end values.
        for group in self.optimizer.param_groups:
            group["lr"] = lr * group.get("lr_mult", 1.0)
            group["weight_decay"] = self.recipe.optimizer.weight_decay * group.get("wd_mult", 1.0)


def _gather_what_mixers_read(wrapped: DistributedDataParallel) -> None:
    """Let a Mamba-2 layer wait for its convolution's weights.

    megatron-core 0.16 waits for the parameters of a module before its forward pass; that of the convolution never runs,
    since the mixer reads its weights, which would be those before the update if they are in another bucket.
    """
    for module in wrapped.module.modules():
        if isinstance(module, DocumentMixer):
            module.register_forward_pre_hook(partial(_wait_for, wrapped, tuple(module.conv1d.parameters())))


def _wait_for(wrapped: DistributedDataParallel, parameters: tuple[nn.Parameter, ...], *unused: Any) -> None:
    for parameter in parameters:
        wrapped.param_to_bucket_group[parameter].finish_param_sync()


def _without_decay(dtype: torch.dtype) -> dict[ParamKey, dict[str, Any]]:
    """Parameters that do not decay: norms, biases, A_log, D and dt_bias.

    megatron-core 0.16.1 mixes up the optimizer states of a group that holds parameters of both dtypes, so what stays
    FP32 in a BF16 model gets a group of its own; its key is an override that nothing reads. In an FP32 model all are in
    one group: without the distributed optimizer, megatron-core takes two with equal multipliers for one when it loads.
    """
    if dtype == torch.float32:
        every = ParamWithNamePredicate("vectors", lambda parameter, name: parameter.dim() == 1)
        return {ParamKey(with_name_predicate=every): {"wd_mult": 0.0}}
    kept = ParamWithNamePredicate("kept_fp32", lambda parameter, name: name.endswith(KEPT_FP32))
    vectors = ParamWithNamePredicate(
        "vectors", lambda parameter, name: parameter.dim() == 1 and not name.endswith(KEPT_FP32)
    )
    return {
        ParamKey(with_name_predicate=kept): {"wd_mult": 0.0, "kept_fp32": True},
        ParamKey(with_name_predicate=vectors): {"wd_mult": 0.0},
    }


def _optimizer_config(recipe: Recipe, layout: ParallelConfig, config: Any) -> OptimizerConfig:
    values, dtype = recipe.optimizer, config.params_dtype
    return OptimizerConfig(
        optimizer="adam",
        lr=0.0,
        weight_decay=values.weight_decay,
        adam_beta1=values.beta1,
        adam_beta2=values.beta2,
        adam_eps=values.eps,
        clip_grad=values.clip_grad,
        bf16=dtype == torch.bfloat16,
        params_dtype=dtype,
        fp8_recipe=config.fp8_recipe if config.fp8 else None,
        use_distributed_optimizer=layout.distributed_optimizer,
        overlap_param_gather=layout.overlap and layout.distributed_optimizer,
    )


def _forward_step(batches: Iterator[MicroBatch], model: Any, score: Any) -> tuple[Tensor, Any]:
    batch = next(batches)
    losses = model(batch.tokens, None, batch.documents, labels=batch.labels)
    return losses, partial(_loss, batch, score)


def _loss(batch: MicroBatch, score: Any, losses: Tensor) -> tuple[Tensor, Tensor, Any]:
    # Three values and calculate_per_token_loss: with two, megatron-core multiplies the loss by the context-parallel
    # size.
    total = losses.float().sum()
    count = torch.tensor(losses.numel(), dtype=torch.int, device=losses.device)
    report = (total.detach(), count) if score is None else score(batch, losses.detach())
    return total, count, report
