"""How much of what an extension reads lies in long documents."""

from __future__ import annotations

import pytest

from nano_pretrain.data.curriculum import Curriculum
from nano_pretrain.data.long_text import LongText, long_text
from nano_pretrain.data.ranges import SourceSize
from nano_pretrain.recipe.errors import RecipeError
from tests.data.curricula import recipe, share, stage

SIZES = {"web": SourceSize((10_000_000,)), "code": SourceSize((10_000_000,))}
LENGTHS = (1024, 4096, 8192)


def of_lengths(before: int, after: int) -> Curriculum:
    """A stage whose samples are three quarters web, after one of web alone."""
    first = stage(400_000, {"p": share(1, web=1)}, before, 4)
    then = stage(400_000, {"p": share(1, web=3, code=1)}, after, 4)
    return Curriculum(recipe({"short": first, "long": then}), SIZES)


def known(web: tuple[int, ...], code: tuple[int, ...]) -> dict[str, dict[int, int]]:
    return {"web": dict(zip(LENGTHS, web, strict=True)), "code": dict(zip(LENGTHS, code, strict=True))}


KNOWN = known((8_000_000, 4_000_000, 1_000_000), (10_000_000, 0, 0))


@pytest.mark.parametrize(
    ("before", "after", "least", "expected"),
    [
        (1024, 4096, 1024, 0.75 * 0.8 + 0.25),
        (4096, 10_000, 4096, 0.75 * 0.4),
        # The longest that is known and not longer: there are at most so many.
        (7000, 10_000, 4096, 0.75 * 0.4),
        (512, 2048, 1024, 0.75 * 0.8 + 0.25),
    ],
)
def test_the_share_is_that_of_the_samples(before: int, after: int, least: int, expected: float) -> None:
    curriculum = of_lengths(before, after)
    found = long_text(curriculum, KNOWN)["long"]
    assert (found.before, found.least) == (before, least)
    # Whole samples: within one of each source.
    assert found.share == pytest.approx(expected, abs=1 / curriculum.stages[1].reads["code"])


@pytest.mark.parametrize(("before", "after"), [(4096, 4096), (4096, 1024), (512, 768)])
def test_nothing_is_said_of_what_is_no_extension_or_not_known(before: int, after: int) -> None:
    assert long_text(of_lengths(before, after), KNOWN) == {}


def test_nothing_is_said_where_the_lengths_of_a_source_are_not_known() -> None:
    curriculum = of_lengths(1024, 4096)
    assert long_text(curriculum, {}) == {}
    assert long_text(curriculum, {"web": KNOWN["web"]}) == {}


def test_an_extension_without_one_long_document_is_refused() -> None:
    none = known((8_000_000, 0, 0), (10_000_000, 0, 0))
    words = (
        r"^stages\.long\.sequence_length: no document of its blends has 4,096 tokens, and samples of the stage before "
        r"have 4,096: 8,192 would teach nothing; prepare long documents, for example long_document_qa, or lower it$"
    )
    with pytest.raises(RecipeError, match=words):
        long_text(of_lengths(4096, 8192), none)
    # Of documents between 512 and 1,024 tokens nothing is known.
    nothing = known((0, 0, 0), (0, 0, 0))
    assert long_text(of_lengths(512, 8192), nothing) == {"long": LongText(512, 1024, 0.0)}
