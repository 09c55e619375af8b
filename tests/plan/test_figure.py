"""The picture shows the schedule as it is and every phase with its blend."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest
from matplotlib.axes import Axes
from matplotlib.patches import Rectangle

from nano_pretrain.data.blend import MOST_PLATEAUS
from nano_pretrain.plan.data import plan_data
from nano_pretrain.plan.figure import plan_figure
from nano_pretrain.schedule.learning_rate import learning_rate
from tests.plan.recipes import STAGE, named


def curve(ax: Axes) -> dict[int, float]:
    """Tokens of the stage -> learning rate."""
    line = ax.get_lines()[0]
    tokens, rates = (np.asarray(values, np.float64).tolist() for values in (line.get_xdata(), line.get_ydata()))
    return {int(token): rate for token, rate in zip(tokens, rates, strict=True)}


def texts(ax: Axes) -> list[str]:
    return [text.get_text() for text in ax.texts]


def test_the_schedule_of_the_12b() -> None:
    recipe = named("nano_12b_v2")
    figure = plan_figure(plan_data(recipe))
    rates, long_context, _, _ = figure.axes
    found = curve(rates)
    assert found[8_000_000_000] == found[16_400_000_000_000] == 4.5e-4
    assert found[20_000_000_000_000] == pytest.approx(4.5e-6)
    stage = recipe.stages[STAGE]
    assert found == {tokens: learning_rate(stage.schedule, stage.tokens, tokens) for tokens in found}
    assert max(later - earlier for earlier, later in pairwise(found)) < stage.tokens / 1000
    assert texts(rates) == ["0.00045 at 8B", "0.00045 at 16.4T", "4.5e-06 at 20T", "p1", "p2", "p3"]
    assert set(curve(long_context).values()) == {4.5e-6}
    assert rates.get_title() == STAGE


def test_the_blend_fills_every_phase() -> None:
    data = plan_data(named("nemotron_h_56b"))
    figure = plan_figure(data)
    bars = [patch for patch in figure.axes[1].patches if isinstance(patch, Rectangle)]
    phases = data.curriculum.stages[0].phases
    for phase in phases:
        heights = [bar.get_height() for bar in bars if bar.get_x() == phase.start_tokens]
        assert sum(heights) == pytest.approx(100)
        tokens = data.tokens[STAGE][phase.name]
        assert sorted(heights)[-1] == pytest.approx(100 * max(tokens.values()) / sum(tokens.values()))
    assert [phase.name for phase in phases] == texts(figure.axes[0])[-4:]
    legend = {text.get_text() for text in figure.legends[0].get_texts()}
    assert legend == set(data.sources)


def test_a_ramp_is_drawn_plateau_by_plateau() -> None:
    data = plan_data(named("nano_12b_v2", "stages.pretrain.phases.p2.ramp_tokens=2_000_000_000_000"))
    bars = [patch for patch in plan_figure(data).axes[2].patches if isinstance(patch, Rectangle)]
    code, web = list(data.sources).index("code"), list(data.sources).index("web_crawl")
    heights = [[bar.get_height() for bar in bars[number :: len(data.sources)]] for number in (code, web)]
    assert heights[0] == pytest.approx([20] * (1 + MOST_PLATEAUS + 2), abs=0.1)
    assert heights[1] == pytest.approx(
        [59.0, *(59.0 - (59.0 - 32.7) * (number + 0.5) / MOST_PLATEAUS for number in range(MOST_PLATEAUS)), 32.7, 13.5],
        abs=0.1,
    )
