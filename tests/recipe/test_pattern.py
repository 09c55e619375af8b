import pytest

from nano_pretrain.recipe.errors import RecipeError
from nano_pretrain.recipe.pattern import LayerType, count_layers, parse_pattern


def test_layers_come_in_the_order_of_the_symbols() -> None:
    assert parse_pattern("M-*") == (LayerType.MAMBA, LayerType.FEED_FORWARD, LayerType.ATTENTION)


def test_the_12b_has_28_mamba_28_feed_forward_and_6_attention_layers() -> None:
    counts = count_layers("M-M-M-M*-M-M-M-M*-M-M-M-M*-M-M-M-M*-M-M-M-M*-M-M-M-M*-M-M-M-M-")
    assert (counts.mamba, counts.feed_forward, counts.attention, counts.total) == (28, 28, 6, 62)


@pytest.mark.parametrize(
    ("pattern", "letter", "position"), [("M-x*", "'x'", "position 3"), ("m", "'m'", "position 1"), ("M- ", "' '", "3")]
)
def test_a_strange_letter_is_named_with_its_position(pattern: str, letter: str, position: str) -> None:
    with pytest.raises(RecipeError, match=r"model\.pattern") as caught:
        parse_pattern(pattern)
    assert letter in str(caught.value)
    assert position in str(caught.value)


def test_an_empty_pattern_is_refused() -> None:
    with pytest.raises(RecipeError, match=r"model\.pattern: is empty"):
        parse_pattern("")
