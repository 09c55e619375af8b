"""The language model: megatron-core's MambaModel with a masked vocabulary padding."""

from __future__ import annotations

from typing import Any

import torch
from megatron.core.models.mamba import MambaModel
from megatron.core.tensor_parallel import (
    ColumnParallelLinear,
    RowParallelLinear,
    VocabParallelEmbedding,
    set_tensor_model_parallel_attributes,
)
from torch import Tensor, nn

from nano_pretrain.kernels.cross_entropy import vocabulary_cross_entropy
from nano_pretrain.model.config import transformer_config
from nano_pretrain.model.initialisation import initialise_weights
from nano_pretrain.model.layers import DocumentMixer, stack_spec
from nano_pretrain.model.recompute import recompute
from nano_pretrain.platform import Platform
from nano_pretrain.precision.losses import QuantisationLosses
from nano_pretrain.precision.parallel import quantise_linears
from nano_pretrain.precision.primary import in_high_precision
from nano_pretrain.recipe.derived import padded_vocab_size
from nano_pretrain.recipe.schema import ParallelConfig, Recipe
from nano_pretrain.recipe.split import pipeline_split

KEPT_FP32 = (".A_log", ".D", ".dt_bias")
"""Parameters that are FP32 in a BF16 model."""

_SHARDED_DIMENSION = {ColumnParallelLinear: 0, RowParallelLinear: 1, VocabParallelEmbedding: 0}
"""Dimension of the weight that is divided among tensor-parallel ranks."""


class HybridModel(MambaModel):
    """MambaModel whose padded vocabulary entries get no probability.

    Args:
        true_vocab_size: entries of the tokenizer; logits from there on are masked in the loss.
        **kwargs: those of megatron-core's MambaModel.

    Attributes:
        quantisation_losses: of the FP8 linears on a CPU; None where there are none.
    """

    quantisation_losses: QuantisationLosses | None = None

    def __init__(self, true_vocab_size: int, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.true_vocab_size = true_vocab_size

    def compute_language_model_loss(self, labels: Tensor, logits: Tensor) -> Tensor:
        """Loss of each token in nats [batch, length], from labels and local logits [length, batch, vocab / TP].

        On a CPU the backward pass writes the gradient over the logits.

        Raises:
            ValueError: on a CPU, a label is not in the vocabulary.
        """
        if logits.is_cuda:
            return self.masked_loss(labels, logits)
        return vocabulary_cross_entropy(logits, labels, self.true_vocab_size, self.pg_collection.tp)

    def masked_loss(self, labels: Tensor, logits: Tensor) -> Tensor:
        """As `compute_language_model_loss`, by megatron-core."""
        first = self.pg_collection.tp.rank() * logits.shape[-1]
        valid = max(0, self.true_vocab_size - first)
        if valid < logits.shape[-1]:
            padding = torch.arange(logits.shape[-1], device=logits.device) >= valid
            logits = logits.masked_fill(padding, torch.finfo(logits.dtype).min)
        out: Tensor = super().compute_language_model_loss(labels, logits)
        return out


def build_model(recipe: Recipe, layout: ParallelConfig, platform: Platform, sequence_length: int) -> HybridModel:
    """This rank's part of the model with its initial weights, which depend on `run.seed` only.

    Args:
        recipe: the recipe.
        layout: layout of the process groups, which must exist.
        platform: the platform.
        sequence_length: of the stage; layers are divided among pipeline positions by their cost at it.
    """
    from megatron.core import parallel_state

    config = transformer_config(recipe, layout, platform)
    split = pipeline_split(recipe.model, layout, sequence_length)
    position = parallel_state.get_pipeline_model_parallel_rank()
    # The constructors draw weights that are overwritten below.
    with torch.random.fork_rng(devices=[]):
        model = HybridModel(
            true_vocab_size=recipe.model.vocab_size,
            config=config,
            mamba_stack_spec=stack_spec(platform, recipe.model.mamba_conv_width, split, position),
            vocab_size=padded_vocab_size(recipe.model),
            max_sequence_length=sequence_length,
            pre_process=parallel_state.is_pipeline_first_stage(),
            post_process=parallel_state.is_pipeline_last_stage(),
            hybrid_override_pattern=recipe.model.pattern,
            position_embedding_type="none",
            share_embeddings_and_output_weights=False,
        )
    for module in model.modules():
        if isinstance(module, DocumentMixer):
            _finish_mixer(module, recipe.model.norm_epsilon)
        elif type(module) in _SHARDED_DIMENSION:
            # megatron-core does it when it initialises; the gradient norm counts an unmarked weight on one rank only.
            set_tensor_model_parallel_attributes(module.weight, True, _SHARDED_DIMENSION[type(module)], 1)
    if platform.name == "cpu":
        # On CUDA Transformer Engine's linears do it: engine_fields.
        model.quantisation_losses = quantise_linears(model.decoder.layers, recipe.model.pattern, recipe.precision)
    recompute(model, recipe.recompute.granularity)
    with in_high_precision(model):
        initialise_weights(model, recipe.model, recipe.run.seed)
    return model


def _finish_mixer(mixer: DocumentMixer, norm_epsilon: float) -> None:
    # megatron-core fixes the epsilon of the gated norm at 1e-5 and stores dt_bias in the parameters' dtype; A_log and D
    # are FP32 there, and dt_bias decides on the decay as they do.
    mixer.norm.eps = norm_epsilon
    dt_bias = mixer.dt_bias
    fp32 = nn.Parameter(dt_bias.detach().float())
    fp32.tensor_model_parallel = True  # type: ignore[attr-defined]
    mixer.dt_bias = fp32
    mixer.cp.dt_bias_cp1 = fp32
