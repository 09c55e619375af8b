r"""Model FLOPs of the hybrid per token, by layer type.

What is counted: every matrix product, the causal convolution, the selective scan and the output head. An addition is
one FLOP and a multiplication is one, so a matrix of m x n costs 2mn a token. What is not: the embedding lookup,
norms, activations, gates, softmax and residual additions, all of them linear in the width and under one percent.

With h the hidden size, f the feed-forward width, S the sequence length, and for Mamba-2 the heads H, head dimension
P, inner width d = HP, groups G, state size N and convolution width K (d does not have to be 2h):

* feed-forward: 4hf.
* attention, q query heads, k key/value groups, head dimension e: projections 4he(q + k); scores and weighted values
  4qeS over a whole S x S square, of which causality leaves half: 2qeS.
* Mamba-2: projections 2h(2d + 2GN + H) and 2dh; convolution 2K(d + 2GN); scan in its recurrent form,
  state = exp(dt A) state + (dt x) B^T and y = C state + D x, for each of the d channels: 1 for dt x, 3N for the
  state (decay, outer product, addition), 2N for the product with C, and 2 for D x: d(5N + 3). The chunked form that
  hardware prefers does more than this; the surplus is not model FLOPs.
* head: 2hV over the vocabulary without padding.

The backward pass makes two products for each of the forward pass (towards the input and towards the weight, or
towards both inputs), so a training token costs three forward passes. Recomputation is not counted.

For the 12B at 8,192 tokens that is 7.19e10 FLOPs per training token; its model card states 1.45e24 FLOPs for 20e12
tokens, 7.25e10.
"""

from __future__ import annotations

from dataclasses import dataclass

from nano_pretrain.recipe.derived import mamba_shape
from nano_pretrain.recipe.pattern import count_layers
from nano_pretrain.recipe.schema import ModelConfig


@dataclass(frozen=True)
class MambaFlops:
    """Forward FLOPs of one token in one Mamba-2 layer."""

    projections: int
    convolution: int
    scan: int

    @property
    def total(self) -> int:
        """All of the layer."""
        return self.projections + self.convolution + self.scan


@dataclass(frozen=True)
class AttentionFlops:
    """Forward FLOPs of one token in one attention layer, averaged over a sequence."""

    projections: int
    core: int

    @property
    def total(self) -> int:
        """All of the layer."""
        return self.projections + self.core


@dataclass(frozen=True)
class ModelFlops:
    """Forward FLOPs of one token over all layers of a type, and their sums."""

    mamba: int
    feed_forward: int
    attention: int
    head: int

    @property
    def forward(self) -> int:
        """FLOPs of one token in the forward pass."""
        return self.mamba + self.feed_forward + self.attention + self.head

    @property
    def training(self) -> int:
        """FLOPs of one token in the forward and backward pass."""
        return 3 * self.forward


def mamba_layer_flops(model: ModelConfig) -> MambaFlops:
    """One token through one Mamba-2 layer."""
    shape = mamba_shape(model)
    return MambaFlops(
        projections=2 * model.hidden_size * (shape.projected + shape.inner),
        convolution=2 * model.mamba_conv_width * shape.conv,
        scan=shape.inner * (5 * model.mamba_state_dim + 3),
    )


def feed_forward_layer_flops(model: ModelConfig) -> int:
    """One token through one feed-forward layer."""
    return 4 * model.hidden_size * model.ffn_hidden_size


def attention_layer_flops(model: ModelConfig, sequence_length: int) -> AttentionFlops:
    """One token through one attention layer, the mean over a sequence of `sequence_length` tokens."""
    heads = model.num_attention_heads + model.num_query_groups
    return AttentionFlops(
        projections=4 * model.hidden_size * model.head_dim * heads,
        core=2 * model.num_attention_heads * model.head_dim * sequence_length,
    )


def count_flops(model: ModelConfig, sequence_length: int) -> ModelFlops:
    """FLOPs of one token of a sequence of `sequence_length` tokens, by layer type.

    Raises:
        RecipeError: the layer pattern is wrong.
    """
    layers = count_layers(model.pattern)
    return ModelFlops(
        mamba=layers.mamba * mamba_layer_flops(model).total,
        feed_forward=layers.feed_forward * feed_forward_layer_flops(model),
        attention=layers.attention * attention_layer_flops(model, sequence_length).total,
        head=2 * model.hidden_size * model.vocab_size,
    )
