"""Parameters of the hybrid, by layer type, from the recipe alone."""

from __future__ import annotations

from dataclasses import dataclass

from nano_pretrain.recipe.derived import mamba_shape
from nano_pretrain.recipe.pattern import count_layers
from nano_pretrain.recipe.schema import ModelConfig


@dataclass(frozen=True)
class ParameterCount:
    """Parameters of a model; each layer with the RMSNorm before it, the vocabulary without padding."""

    embedding: int
    mamba: int
    feed_forward: int
    attention: int
    final_norm: int
    head: int

    @property
    def total(self) -> int:
        """All parameters."""
        return self.embedding + self.mamba + self.feed_forward + self.attention + self.final_norm + self.head


def mamba_layer_parameters(model: ModelConfig) -> int:
    """Parameters of one Mamba-2 layer: norm, projections, convolution with bias, A_log, D, dt_bias, gated norm."""
    shape = mamba_shape(model)
    projections = model.hidden_size * (shape.projected + shape.inner)
    convolution = shape.conv * (model.mamba_conv_width + 1)
    per_head = 3 * model.mamba_num_heads
    return model.hidden_size + projections + convolution + per_head + shape.inner


def feed_forward_layer_parameters(model: ModelConfig) -> int:
    """Parameters of one feed-forward layer: norm and two matrices, no gate, no bias."""
    return model.hidden_size + 2 * model.hidden_size * model.ffn_hidden_size


def attention_layer_parameters(model: ModelConfig) -> int:
    """Parameters of one attention layer: norm, query and output for each head, key and value for each group."""
    heads = 2 * model.num_attention_heads + 2 * model.num_query_groups
    return model.hidden_size + model.hidden_size * model.head_dim * heads


def count_parameters(model: ModelConfig) -> ParameterCount:
    """Parameters of the whole model, by part.

    Raises:
        RecipeError: the layer pattern is wrong.
    """
    layers = count_layers(model.pattern)
    table = model.vocab_size * model.hidden_size
    return ParameterCount(
        embedding=table,
        mamba=layers.mamba * mamba_layer_parameters(model),
        feed_forward=layers.feed_forward * feed_forward_layer_parameters(model),
        attention=layers.attention * attention_layer_parameters(model),
        final_norm=model.hidden_size,
        head=table,
    )
