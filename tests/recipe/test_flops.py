"""The formulas against the equations themselves, carried out with numbers that count."""

from __future__ import annotations

import math

import pytest

from nano_pretrain.recipe.flops import attention_layer_flops, count_flops, feed_forward_layer_flops, mamba_layer_flops
from nano_pretrain.recipe.schema import ModelConfig


class Counted:
    """A number that counts the additions and multiplications it takes part in."""

    operations = 0

    def __add__(self, other: Counted) -> Counted:
        Counted.operations += 1
        return Counted()

    def __mul__(self, other: Counted) -> Counted:
        Counted.operations += 1
        return Counted()


def vector(length: int) -> list[Counted]:
    return [Counted() for _ in range(length)]


def dot(left: list[Counted], right: list[Counted]) -> Counted:
    total = Counted()
    for one, other in zip(left, right, strict=True):
        total = total + one * other
    return total


def project(inputs: list[Counted], rows: int) -> list[Counted]:
    return [dot(vector(len(inputs)), inputs) for _ in range(rows)]


def operations_since(before: int) -> int:
    return Counted.operations - before


SMALL = ModelConfig(
    pattern="M-M*-",
    hidden_size=12,
    ffn_hidden_size=20,
    num_attention_heads=4,
    num_query_groups=2,
    head_dim=5,
    mamba_num_heads=6,
    mamba_head_dim=3,
    mamba_num_groups=2,
    mamba_state_dim=7,
    mamba_conv_width=4,
    vocab_size=30,
    init_std=0.02,
)


def nano_12b_v2() -> ModelConfig:
    return ModelConfig(
        pattern="M-M-M-M*-M-M-M-M*-M-M-M-M*-M-M-M-M*-M-M-M-M*-M-M-M-M*-M-M-M-M-",
        hidden_size=5120,
        ffn_hidden_size=20480,
        num_attention_heads=40,
        num_query_groups=8,
        head_dim=128,
        mamba_num_heads=128,
        mamba_head_dim=80,
        mamba_num_groups=8,
        mamba_state_dim=128,
        vocab_size=131_072,
        init_std=0.0125,
    )


def test_one_token_through_a_mamba_layer() -> None:
    inner, groups_of_state = 6 * 3, 2 * 7
    flops = mamba_layer_flops(SMALL)
    before = Counted.operations
    # z, x, B, C and a dt for each head, then back to the hidden size.
    project(vector(12), inner + inner + groups_of_state + groups_of_state + 6)
    project(vector(inner), 12)
    assert flops.projections == operations_since(before)
    before = Counted.operations
    for _ in range(inner + 2 * groups_of_state):
        dot(vector(4), vector(4))
    assert flops.convolution == operations_since(before)
    before = Counted.operations
    for _ in range(inner):
        one_channel_of_the_scan(state=vector(7), b=vector(7), c=vector(7))
    assert flops.scan == operations_since(before)
    assert flops.total == flops.projections + flops.convolution + flops.scan


def one_channel_of_the_scan(state: list[Counted], b: list[Counted], c: list[Counted]) -> Counted:
    decay, dt, x, skip = vector(4)
    scaled = dt * x
    state = [decay * old + scaled * weight for old, weight in zip(state, b, strict=True)]
    return dot(c, state) + skip * x


def test_one_token_through_a_feed_forward_layer() -> None:
    before = Counted.operations
    project(project(vector(12), 20), 12)
    assert feed_forward_layer_flops(SMALL) == operations_since(before)


def test_a_sequence_through_an_attention_layer() -> None:
    length = 8
    flops = attention_layer_flops(SMALL, length)
    before = Counted.operations
    project(vector(12), 4 * 5)
    project(vector(12), 2 * 5)
    project(vector(12), 2 * 5)
    project(vector(4 * 5), 12)
    assert flops.projections == operations_since(before)
    before = Counted.operations
    for _ in range(4 * length * length):
        dot(vector(5), vector(5))  # a score
        dot(vector(5), vector(5))  # its part of the weighted values
    assert flops.core * length == operations_since(before) // 2


def test_the_model_is_the_sum_of_its_layers_and_its_head() -> None:
    flops = count_flops(SMALL, sequence_length=8)
    assert flops.mamba == 2 * mamba_layer_flops(SMALL).total
    assert flops.feed_forward == 2 * feed_forward_layer_flops(SMALL)
    assert flops.attention == attention_layer_flops(SMALL, 8).total
    assert flops.head == 2 * 12 * 30
    assert flops.forward == flops.mamba + flops.feed_forward + flops.attention + flops.head
    assert flops.training == 3 * flops.forward


def test_the_12b_agrees_with_its_model_card() -> None:
    training = count_flops(nano_12b_v2(), sequence_length=8192).training
    assert math.floor(training / 1e8 + 0.5) / 100 == pytest.approx(7.19)
    assert training == pytest.approx(1.45e24 / 20e12, rel=0.01)


def test_only_the_attention_core_grows_with_the_sequence() -> None:
    short, long = (count_flops(nano_12b_v2(), length) for length in (8192, 524_288))
    assert (short.mamba, short.feed_forward, short.head) == (long.mamba, long.feed_forward, long.head)
    assert long.attention - short.attention == 6 * 2 * 40 * 128 * (524_288 - 8192)
