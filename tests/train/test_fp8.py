"""A run in FP8: it is killed and goes on bit for bit, is watched, and its checkpoint generates in BF16."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from tests.train.small_run import STEPS, TOKENS_PER_STEP, Finished, SmallRuns, checkpoints, learned, lines, wait_until

FP8 = [
    "precision=fp8_blockwise", "precision.bf16_first_linears=2", "precision.bf16_last_linears=2", "log.fp8_every=4",
    # Every dimension of a product in multiples of 16.
    "model.mamba_num_heads=16", "model.mamba_head_dim=16",
]  # fmt: skip
"""Of the ten linears of M-M*- six are quantised."""


@pytest.fixture(scope="module")
def whole(small: SmallRuns) -> tuple[Path, Finished]:
    return small.path("fp8"), small.run("train", "fp8", *FP8)


@pytest.fixture(scope="module")
def killed(small: SmallRuns) -> tuple[Path, Finished]:
    """Killed between two checkpoints, with a line of fp8.jsonl after the first of them; then to its end."""
    run = small.path("fp8_killed")
    process = small.start("train", run.name, *FP8)
    wait_until(
        lambda: checkpoints(run)[:1] == [str(5 * TOKENS_PER_STEP)] and len(lines(run / "fp8.jsonl")) > 2, process
    )
    process.kill()
    process.communicate()
    return run, small.run("train", run.name, *FP8)


def test_it_goes_to_its_end(whole: tuple[Path, Finished]) -> None:
    run, done = whole
    assert done.code == 0, done.text
    losses = [line["loss"] for line in lines(run / "metrics.jsonl")]
    assert len(losses) == STEPS
    assert losses[-1] < losses[0]


@pytest.mark.full
def test_a_killed_run_goes_on_bit_for_bit(whole: tuple[Path, Finished], killed: tuple[Path, Finished]) -> None:
    run, done = killed
    assert done.code == 0, done.text
    assert "continuing at step" in done.text
    assert learned(run) == learned(whole[0])
    assert (run / "fp8.jsonl").read_text() == (whole[0] / "fp8.jsonl").read_text()


def test_the_first_and_every_fourth_step_say_what_each_fp8_linear_loses(whole: tuple[Path, Finished]) -> None:
    found = lines(whole[0] / "fp8.jsonl")
    counted = [1, 4, 8, 12, 16, 20]
    assert [(line["step"], line["tokens"]) for line in found] == [(n, n * TOKENS_PER_STEP) for n in counted]
    for line in found:
        assert list(line["linears"]) == [
            "layers.1.mlp.linear_fc1", "layers.1.mlp.linear_fc2", "layers.2.mixer.in_proj", "layers.2.mixer.out_proj",
            "layers.3.self_attention.linear_qkv", "layers.3.self_attention.linear_proj",
        ]  # fmt: skip
        errors = {
            (linear, operand): of["relative_error"]
            for linear, operands in line["linears"].items()
            for operand, of in operands.items()
        }
        assert len(errors) == 18
        # E4M3 rounds to 4 bits: by up to 1/16, on average over a binade by 0.026.
        assert all(0.02 < error < 0.04 for error in errors.values())
        for operand, worst in line["worst"].items():
            largest = max(error for (_, of), error in errors.items() if of == operand)
            assert errors[worst["linear"], operand] == worst["relative_error"] == largest
        shares = [of for operands in line["linears"].values() for of in operands.values()]
        assert all(0 <= of["flushed"] < 0.2 and of["saturated"] == 0 for of in shares)


def test_the_report_names_the_worst_linears(whole: tuple[Path, Finished]) -> None:
    page = (whole[0] / "report" / "index.html").read_text()
    section = page.partition('<section id="fp8">')[2].partition("</section>")[0]
    for words in ("<td>input</td>", "<td>weight</td>", "<td>gradient</td>", "<td>layers."):
        assert words in section


@pytest.mark.full
def test_a_text_is_generated_in_bf16(small: SmallRuns, whole: tuple[Path, Finished]) -> None:
    options = ["generate.prompt=ab", "generate.max_new_tokens=8"]
    found = small.run("generate", "fp8", *FP8, *options)
    assert found.code == 0, found.text
    # The same weights as those of a BF16 run.
    bf16 = small.path("fp8_as_bf16")
    shutil.copytree(whole[0], bf16)
    recipe = (bf16 / "recipe.yaml").read_text()
    (bf16 / "recipe.yaml").write_text(
        recipe.replace("name: fp8_blockwise", "name: bf16").replace("linears: 2", "linears: 0")
    )
    other = small.run("generate", bf16.name, *options)
    assert other.code == 0, other.text
    assert found.text == other.text
