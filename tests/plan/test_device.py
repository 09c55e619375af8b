"""Hardware: every file is whole, one of your own is read, a wrong one is named."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path

import pytest

from nano_pretrain.plan.device import DIRECTORY, load_device
from nano_pretrain.recipe.errors import RecipeError
from nano_pretrain.recipe.schema import ClusterConfig, PlanConfig
from tests.plan.recipes import device, small

NAMES = sorted(path.stem for path in DIRECTORY.glob("*.yaml"))


def test_the_hardware_that_recipes_are_planned_for_is_there() -> None:
    assert NAMES == ["a100", "b200", "cpu", "h100", "h200"]


@pytest.mark.parametrize("name", NAMES)
def test_every_number_is_sane_and_has_a_comment(name: str) -> None:
    found = device(name)
    assert all(0 < share <= 1 for share in found.shares.values())
    assert found.link_bandwidth >= found.network_bandwidth
    for line in (DIRECTORY / f"{name}.yaml").read_text().splitlines():
        if re.search(r": (\d|null)", line) and not line.startswith("#"):
            assert "#" in line, line


def test_an_h100_as_its_data_sheet_has_it() -> None:
    h100 = device("h100")
    assert h100.peak("fp8") == pytest.approx(2 * h100.peak("bf16"), rel=1e-3)
    assert h100.memory_bytes == 80e9
    assert h100.core_rate("matrix", "fp8") == pytest.approx(0.71 * 1978.9e12)
    assert h100.core_rate("attention", "bf16") == pytest.approx(0.55 * 989.4e12)
    assert h100.link_rate == pytest.approx(0.81 * 450e9)


def test_a_stated_peak_takes_the_place_of_the_files() -> None:
    recipe = replace(small(precision="bf16"), cluster=ClusterConfig(peak_tflops=1.06))
    found = load_device(recipe)
    assert found.peak("bf16") == pytest.approx(1.06e12)
    assert found.peak("fp32") == pytest.approx(0.54e12), "the others in proportion"


def test_hardware_without_a_format_says_so() -> None:
    with pytest.raises(RecipeError, match=r"plan\.hardware: A100 SXM has no FP8 products; write precision\.name=bf16 "):
        device("a100").peak("fp8")


def test_a_file_of_your_own(tmp_path: Path) -> None:
    file = tmp_path / "mine.yaml"
    file.write_text((DIRECTORY / "h100.yaml").read_text().replace("watts: 700.0", "watts: 650"))
    assert device(str(file)).watts == 650


@pytest.mark.parametrize(
    ("old", "new", "words"),
    [
        ("watts: 700.0", "", "does not hold exactly name, platform"),
        ("watts: 700.0", "watts: 0", "watts is 0, no number above 0"),
        ("watts: 700.0", "watts: many", "watts is 'many'"),
        ("bf16: 989.4", "bf16: null", "tflops.bf16 is None"),
        ("scan: 0.30", "scann: 0.30", "shares does not hold exactly fp32"),
        ("platform: cuda", "platform: tpu", "platform is 'tpu'"),
        ("name: H100 SXM", "name: [", "cannot be read"),
    ],
)
def test_a_wrong_file_is_named(tmp_path: Path, old: str, new: str, words: str) -> None:
    file = tmp_path / "mine.yaml"
    file.write_text((DIRECTORY / "h100.yaml").read_text().replace(old, new))
    with pytest.raises(RecipeError) as error:
        device(str(file))
    assert str(error.value).startswith("plan.hardware: ")
    assert words in str(error.value)


def test_unknown_hardware_lists_what_there_is() -> None:
    with pytest.raises(RecipeError, match="no hardware 'gpu'; choose one of a100, b200, cpu, h100, h200"):
        load_device(replace(small(), plan=PlanConfig(hardware="gpu")))
    with pytest.raises(RecipeError, match=r"nowhere.yaml cannot be read"):
        load_device(replace(small(), plan=PlanConfig(hardware="nowhere.yaml")))
