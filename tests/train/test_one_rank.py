"""Faults of a run of one rank. The scenarios start together and share the cores; each test waits for its own."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import pytest

from nano_pretrain.checkpoint.manifest import whole_checkpoints
from nano_pretrain.compose import compose
from nano_pretrain.recipe.load import recorded_recipe
from tests.train import scenarios
from tests.train.scenarios import Story
from tests.train.small_run import STEPS, TOKENS, Finished, SmallRuns, checkpoints, exit_json, learned, lines

Stories = Mapping[str, "Future[Story]"]


@pytest.fixture(scope="module")
def stories(small: SmallRuns) -> Iterator[Stories]:
    """Name of a scenario -> its story; two are told at a time, one for each core."""
    first = [scenarios.whole, scenarios.thin, scenarios.signals, scenarios.sweep, scenarios.not_finite]
    if scenarios.can_mount(small.directory.parent / "probe"):
        first.append(scenarios.full_disk)
    with ThreadPoolExecutor(2) as pool:
        told = {scenario.__name__: pool.submit(scenario, small) for scenario in first}
        # It begins with a copy of the whole run.
        told["whole"].result()
        told["flipped_byte"] = pool.submit(scenarios.flipped_byte, small)
        yield told


@pytest.fixture(scope="module")
def expected(stories: Stories, small: SmallRuns) -> tuple[list[tuple[object, ...]], str]:
    """What a run learns and how it is validated when nobody disturbs it."""
    done = stories["whole"].result()["train"]
    assert done.code == 0, done.text
    return told_of(small.path("whole"))


def told_of(run: Path) -> tuple[list[tuple[object, ...]], str]:
    return learned(run), (run / "validation.jsonl").read_text()


def test_run_of_one_rank_ends(stories: Stories, small: SmallRuns) -> None:
    done = stories["whole"].result()["train"]
    assert done.code == 0, done.text
    assert exit_json(small.path("whole"))["code"] == 0
    assert [line["step"] for line in lines(small.path("whole") / "metrics.jsonl")] == list(range(1, STEPS + 1))


def test_generated_text_is_all_that_is_printed(stories: Stories, small: SmallRuns) -> None:
    done = stories["whole"].result()["generate"]
    (sample,) = lines(small.path("whole") / "samples.jsonl")
    assert (done.code, done.text) == (0, sample["text"] + "\n")
    assert (sample["prompt"], sample["tokens"]) == ("ab", TOKENS)


def test_ctrl_c_in_a_terminal_is_a_request_to_stop(stories: Stories) -> None:
    done = stories["signals"].result()["SIGINT"]
    assert done.code == 75, done.text
    assert "stopped by SIGINT; checkpoint at " in done.last_line
    assert "Traceback" not in done.text


def test_terminal_is_left_in_order(stories: Stories) -> None:
    text = stories["signals"].result()["SIGINT"].text
    assert text.count("\x1b[?25l") == text.count("\x1b[?25h") == 1
    assert re.search(r"pretrain/p1 .*0:00:\d\d.* loss \d\.\d{3}  [\d,]+ tokens/s  MFU [\d.]+%", text)
    # A line that is wider than the terminal would be redrawn by going up a line.
    assert "\x1b[1A" not in text


def test_sigusr1_is_a_request_to_stop(stories: Stories) -> None:
    done = stories["signals"].result()["SIGUSR1"]
    assert done.code == 75, done.text
    assert "stopped by SIGUSR1; checkpoint at " in done.last_line


@pytest.mark.parametrize("verb", ["train", "launch"])
def test_second_trainer_is_refused_and_the_first_goes_on(stories: Stories, small: SmallRuns, verb: str) -> None:
    done = stories["signals"].result()[verb]
    assert done.code == 2
    assert re.fullmatch(
        rf"nano-pretrain: run\.name: another trainer \(process \d+\) is running in {small.path('signals')}; "
        r"wait for it or choose another run\.name\n",
        done.text,
    )


def test_run_that_was_stopped_continues_exactly(
    stories: Stories, small: SmallRuns, expected: tuple[list[tuple[object, ...]], str]
) -> None:
    done = stories["signals"].result()["end"]
    assert done.code == 0, done.text
    assert told_of(small.path("signals")) == expected


def test_damaged_checkpoint_is_named_and_the_one_before_is_taken(
    stories: Stories, small: SmallRuns, expected: tuple[list[tuple[object, ...]], str]
) -> None:
    done = stories["flipped_byte"].result()["end"]
    assert_the_one_before_is_taken(done, small.path("flipped"), r"__0_\d\.distcp", expected)


@pytest.mark.full
def test_a_torn_manifest_is_damage(small: SmallRuns, expected: tuple[list[tuple[object, ...]], str]) -> None:
    done = scenarios.half_manifest(small)["end"]
    assert_the_one_before_is_taken(done, small.path("torn"), r"manifest\.json", expected)


def assert_the_one_before_is_taken(
    done: Finished, run: Path, damage: str, expected: tuple[list[tuple[object, ...]], str]
) -> None:
    assert done.code == 0, done.text
    newest = run / "checkpoints" / str(TOKENS)
    assert re.search(rf"{newest}: damaged \({damage}\); trying the checkpoint before it\n", done.text)
    assert f"continuing at step {STEPS * 3 // 4}, " in done.text
    assert told_of(run) == expected
    assert whole_checkpoints(run)[0] == newest


def test_full_disk_is_one_line_and_the_checkpoint_before_stays(stories: Stories, small: SmallRuns) -> None:
    if "full_disk" not in stories:
        pytest.skip("only root can mount a small file system")
    done = stories["full_disk"].result()["full"]
    left = small.directory.parent / "full-as-left"
    assert done.code == 2, done.text
    assert done.last_line == (
        "nano-pretrain: run.dir: the disk is full, the checkpoint was not written; free space and run again"
    )
    assert "Traceback" not in done.text
    assert checkpoints(left) == [str(TOKENS // 4)] == [path.name for path in whole_checkpoints(left)]
    assert exit_json(left)["code"] == 2
    assert "the disk is full" in exit_json(left)["reason"]


def test_run_goes_on_when_there_is_space_again(
    stories: Stories, small: SmallRuns, expected: tuple[list[tuple[object, ...]], str]
) -> None:
    if "full_disk" not in stories:
        pytest.skip("only root can mount a small file system")
    done = stories["full_disk"].result()["end"]
    assert done.code == 0, done.text
    assert told_of(small.path("full")) == expected


def test_loss_that_is_not_finite_ends_the_run_without_a_checkpoint_of_it(stories: Stories, small: SmallRuns) -> None:
    done = stories["not_finite"].result()["end"]
    run = small.path("not_finite")
    assert done.code == 1, done.text
    assert re.fullmatch(r"nano-pretrain: step \d+: loss .*, gradient norm .*with a lower learning rate", done.last_line)
    assert "Traceback" not in done.text
    assert exit_json(run)["code"] == 1
    assert exit_json(run)["reason"].startswith("NotFiniteError: step ")
    assert checkpoints(run) == []
    assert "NaN" not in (run / "metrics.jsonl").read_text()


def test_sweep_trains_each_job_in_a_directory_of_its_own(stories: Stories, small: SmallRuns) -> None:
    done = stories["sweep"].result()["end"]
    assert done.code == 0, done.text
    for beta2 in (0.95, 0.99):
        run = small.path(f"sweep-optimizer.beta2={beta2}")
        assert recorded_recipe(run).optimizer.beta2 == beta2
        assert len(lines(run / "metrics.jsonl")) == 2
        assert exit_json(run)["code"] == 0
    assert not small.path("sweep").exists()


def test_thin_trains_all_62_layers(stories: Stories, small: SmallRuns) -> None:
    done = stories["thin"].result()["whole"]
    assert done.code == 0, done.text
    trained = recorded_recipe(small.path("thin")).model
    assert trained.pattern == compose(["recipe=nano_12b_v2"]).recipe.model.pattern
    losses = [line["loss"] for line in lines(small.path("thin") / "metrics.jsonl")]
    assert len(losses) == STEPS
    assert losses[-1] < losses[0]


@pytest.mark.full
def test_thin_continues_exactly_after_a_kill(stories: Stories, small: SmallRuns) -> None:
    assert stories["thin"].result()["whole"].code == 0
    story = scenarios.thin_killed(small)
    assert story["killed"].code == -9
    assert story["end"].code == 0, story["end"].text
    assert "continuing at step 10, " in story["end"].text
    assert told_of(small.path("thin-killed")) == told_of(small.path("thin"))
