"""Every layout trains the same model: weights, gradients, losses, moments and tokens equal one rank's."""

from __future__ import annotations

import numpy as np
import pytest

from tests.distributed.comparing import Differences
from tests.distributed.courses import END
from tests.distributed.layouts import GRADIENTS, LAYOUTS, MOMENTS, QUICK, WEIGHTS, Courses, close, some_quick

OTHERS = some_quick((name for name in LAYOUTS if name != "one rank"), QUICK)


def assert_all_below(tolerance: float, differences: Differences) -> None:
    worst = max(differences, key=lambda name: differences[name])
    assert differences[worst] < tolerance, worst


def test_the_reference_trains_and_its_gradient_is_clipped(courses: Courses) -> None:
    steps = courses.of("one rank").steps
    assert len(set(steps.losses)) == END
    # Otherwise a wrong norm would not change the training that is compared.
    assert min(steps.grad_norms) > courses.recipe.optimizer.clip_grad


@pytest.mark.parametrize("name", OTHERS)
def test_initial_weights_are_equal_bit_for_bit(name: str, courses: Courses) -> None:
    found = courses.of(name).initial
    assert found == dict.fromkeys(found, 0.0)
    assert len(found) == len(courses.of("one rank").initial) > 60


@pytest.mark.parametrize("name", OTHERS)
def test_every_gradient_of_the_first_step_is_equal(name: str, courses: Courses) -> None:
    # Before clipping: the norm hides a wrong gradient of one tensor, and Adam hides its scale.
    assert courses.of(name).gradients.keys() == courses.of(name).initial.keys()
    assert_all_below(GRADIENTS, courses.of(name).gradients)


@pytest.mark.parametrize("name", OTHERS)
def test_losses_and_gradient_norms_are_equal(name: str, courses: Courses) -> None:
    actual, expected = courses.of(name).steps, courses.of("one rank").steps
    assert len(actual.losses) == len(actual.grad_norms) == END
    assert close(actual.losses, expected.losses)
    assert close(actual.grad_norms, expected.grad_norms)


@pytest.mark.parametrize("name", OTHERS)
def test_every_weight_and_moment_is_equal_after_the_last_step(name: str, courses: Courses) -> None:
    taken = courses.of(name)
    assert taken.weights.keys() == taken.initial.keys()
    assert_all_below(WEIGHTS, taken.weights)
    assert any(".exp_avg_sq." in name for name in taken.moments)
    assert_all_below(MOMENTS, taken.moments)


@pytest.mark.parametrize("name", OTHERS)
def test_copies_of_a_weight_stay_equal_bit_for_bit(name: str, courses: Courses) -> None:
    assert courses.of(name).copies_that_differ == []


@pytest.mark.parametrize("name", OTHERS)
def test_every_global_batch_holds_the_same_samples(name: str, courses: Courses) -> None:
    expected, actual = courses.of("one rank").samples, courses.of(name).samples
    for field in expected:
        assert np.array_equal(actual[field], expected[field]), field


def test_the_reference_is_given_whole_samples_with_documents(courses: Courses) -> None:
    given = courses.of("one rank").samples
    assert given["tokens"].shape == (END, 8, 48)
    assert np.array_equal(given["labels"][..., :-1], given["tokens"][..., 1:])
    assert len(np.unique(given["tokens"].reshape(-1, 48), axis=0)) == END * 8
    assert given["documents"].max() > 0
