"""A token at a time, with recurrent state and key/value cache, gives what the whole text gives."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from nano_pretrain.evaluate.generate import continuation, next_logits, sample
from nano_pretrain.platform import Platform
from nano_pretrain.recipe.schema import GenerateConfig
from tests.model.building import build, logits
from tests.model.recipes import MODEL, small_recipe

PARITY = 1e-4
"""Asked of the product in fp32; logits are of size 1 and the largest error seen is 8e-6."""
NO_EOD = -1


@pytest.fixture(params=["M", "*", "M*-M"])
def model(request: pytest.FixtureRequest, platform: Platform) -> Any:
    return build(platform, small_recipe(pattern=request.param, init_std=0.3)).eval()


def tokens(count: int, seed: int = 0) -> Tensor:
    return torch.randint(MODEL.vocab_size, (1, count), generator=torch.Generator().manual_seed(seed))


def context(length: int) -> Any:
    from megatron.core.inference.contexts import StaticInferenceContext

    return StaticInferenceContext(1, length)


@pytest.mark.parametrize("prompt", [1, 2, 3, 5, 70])
def test_logits_equal_those_of_the_whole_text(model: Any, prompt: int) -> None:
    text = tokens(prompt + 12)
    expected = logits(model, text)[0, prompt - 1 :]
    cache = context(text.shape[1])
    found = [next_logits(model, text[:, :prompt], cache)]
    found += [next_logits(model, text[:, i : i + 1], cache) for i in range(prompt, text.shape[1])]
    assert (torch.cat(found) - expected).abs().max() < PARITY
    assert expected.std() > 0.1


def test_a_cache_that_is_lost_would_be_seen(model: Any) -> None:
    text = tokens(20)
    alone = next_logits(model, text[:, -1:], context(1))
    assert (alone - logits(model, text)[:, -1]).abs().max() > 100 * PARITY


def test_greedy_text_is_the_likeliest_token_each_time(model: Any) -> None:
    prompt = tokens(6)[0].tolist()
    options = GenerateConfig(max_new_tokens=10, temperature=0.0)
    found = list(continuation(model, prompt, options, NO_EOD, MODEL.vocab_size))
    assert len(found) == 10
    for length, token in enumerate(found, start=len(prompt)):
        text = torch.tensor([[*prompt, *found]])[:, :length]
        assert token == int(logits(model, text)[0, -1, : MODEL.vocab_size].argmax())


def test_text_follows_from_the_seed_and_ends_before_the_end_of_document(model: Any) -> None:
    prompt = tokens(6)[0].tolist()

    def text(seed: int, eod: int = NO_EOD) -> list[int]:
        options = GenerateConfig(max_new_tokens=20, temperature=1.0, top_p=1.0, seed=seed)
        return list(continuation(model, prompt, options, eod, MODEL.vocab_size))

    whole = text(1)
    assert text(1) == whole
    assert text(2) != whole
    assert text(1, eod=whole[7]) == whole[: whole.index(whole[7])]


def test_padding_is_never_sampled(platform: Platform) -> None:
    model = build(platform, small_recipe(pattern="-", init_std=0.01))
    # Logits are nearly flat: half of the draws would be padding.
    options = GenerateConfig(max_new_tokens=60, temperature=1.0, top_p=1.0)
    assert max(continuation(model, [1], options, NO_EOD, 400)) < 400


distributions = st.lists(st.floats(-8, 8, width=32), min_size=1, max_size=30, unique=True).map(torch.tensor)


def draws(values: Tensor, count: int, **options: float) -> set[int]:
    config = GenerateConfig(**options)  # type: ignore[arg-type]
    generator = torch.Generator().manual_seed(0)
    return {sample(values, config, generator) for _ in range(count)}


@given(distributions)
def test_temperature_zero_is_greedy(values: Tensor) -> None:
    assert draws(values, 3, temperature=0.0) == {int(values.argmax())}


@given(distributions, st.floats(0.01, 1), st.floats(0.3, 3))
def test_samples_come_from_the_smallest_set_with_probability_top_p(
    values: Tensor, top_p: float, temperature: float
) -> None:
    order = values.argsort(descending=True)
    cumulative = (values.double() / temperature).softmax(0)[order].cumsum(0)
    # The margin is the fp32 rounding of the sum.
    allowed = order[: 1 + int((cumulative < top_p + 1e-5).sum())].tolist()
    assert draws(values, 50, top_p=top_p, temperature=temperature) <= set(allowed)


def test_frequencies_follow_the_probabilities() -> None:
    probabilities = torch.tensor([0.5, 0.3, 0.15, 0.05])
    options, generator = GenerateConfig(temperature=1.0, top_p=0.9), torch.Generator().manual_seed(0)
    counts = torch.zeros(4)
    for _ in range(4000):
        counts[sample(probabilities.log(), options, generator)] += 1
    expected = torch.tensor([0.5, 0.3, 0.15, 0.0]) / 0.95
    # Five standard deviations of a frequency in 4,000 draws.
    assert (counts / 4000 - expected).abs().max() < 5 * (0.25 / 4000) ** 0.5
    assert counts[3] == 0
