import pytest

from nano_pretrain.plan.params import count_parameters
from nano_pretrain.recipe.derived import mamba_shape
from nano_pretrain.recipe.schema import ModelConfig

PATTERN_12B = "M-M-M-M*-M-M-M-M*-M-M-M-M*-M-M-M-M*-M-M-M-M*-M-M-M-M*-M-M-M-M-"
PATTERN_9B = "M-M-M-MM-M-M-M*-M-M-M*-M-M-M-M*-M-M-M-M*-M-MM-M-M-M-M-M-"
PATTERN_8B = "M-M-M-M*-M-M-M-M-M*-M-M-M-M-M*-M-M-M-M-M*-M-M-M-M-M-"
PATTERN_47B = "M-M-M-M-M-M-M-M-M*-M-M-M-M-M-M-M-M-M-M*-M-M-M-M-M*-M-M-M-M-M*-M-M-M-M-M-M-M---MM---M-M*-M-M-M-M-M-"
PATTERN_56B = "M-M-M-M*-" + 9 * "M-M-M-M-M*-" + "M-M-M-M-M-"


def config(
    pattern: str, widths: tuple[int, int], heads: tuple[int, int], mamba: tuple[int, int], *, state: int = 128
) -> ModelConfig:
    return ModelConfig(
        pattern=pattern,
        hidden_size=widths[0],
        ffn_hidden_size=widths[1],
        num_attention_heads=heads[0],
        num_query_groups=heads[1],
        head_dim=128,
        mamba_num_heads=mamba[0],
        mamba_head_dim=mamba[1],
        mamba_num_groups=8,
        mamba_state_dim=state,
        vocab_size=131_072,
        init_std=0.02,
    )


NANO_12B = config(PATTERN_12B, (5120, 20480), (40, 8), (128, 80))


# The shapes are those of the released checkpoints; the sums agree with the figures NVIDIA prints for them.
@pytest.mark.parametrize(
    ("model", "total"),
    [
        (NANO_12B, 12_310_001_152),
        (config(PATTERN_12B, (5120, 20480), (40, 8), (160, 64)), 12_314_591_360),
        (config(PATTERN_9B, (4480, 15680), (40, 8), (128, 80)), 8_888_227_328),
        (config(PATTERN_8B, (3072, 12288), (32, 8), (112, 64)), 4_489_223_040),
        (config(PATTERN_8B, (4096, 21504), (32, 8), (128, 64)), 8_100_852_736),
        (config(PATTERN_47B, (8192, 30720), (64, 8), (256, 64), state=256), 46_791_554_816),
        (config(PATTERN_56B, (8192, 32768), (64, 8), (256, 64), state=256), 56_324_350_464),
    ],
    ids=["nano_12b_v2", "nano_12b_v2_paper", "nano_9b_v2", "h_4b", "h_8b", "h_47b", "h_56b"],
)
def test_totals_of_the_published_models(model: ModelConfig, total: int) -> None:
    assert count_parameters(model).total == total


def test_the_12b_projects_to_22656_rows() -> None:
    shape = mamba_shape(NANO_12B)
    assert (shape.inner, shape.conv, shape.projected) == (10_240, 12_288, 22_656)


def test_the_inner_width_does_not_follow_from_the_hidden_size() -> None:
    assert mamba_shape(config(PATTERN_9B, (4480, 15680), (40, 8), (128, 80))).inner == 10_240
