"""What is exported of a checkpoint does not depend on the layout that wrote it."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from nano_pretrain.convert.assemble import whole
from nano_pretrain.convert.names import hf_tensors
from nano_pretrain.convert.native import NativeReader
from tests.distributed.layouts import LAYOUTS, QUICK, Courses, some_quick

OTHERS = some_quick((name for name in LAYOUTS if name != "one rank"), QUICK)


def exported(courses: Courses, name: str) -> dict[str, Tensor]:
    """The tensors of an export of the initial weights, which are equal in all layouts, as this one saved them."""
    courses.of(name)
    reader = NativeReader(courses.directory / name / "initial", lambda _: None)
    return {target.name: whole(target, reader, torch.float32) for target in hf_tensors(courses.recipe.model)}


@pytest.mark.parametrize("name", OTHERS)
def test_every_layout_exports_the_tensors_of_one_rank(name: str, courses: Courses) -> None:
    expected, found = exported(courses, "one rank"), exported(courses, name)
    assert found.keys() == expected.keys()
    for tensor, value in expected.items():
        assert value.unique().numel() > 1 or value.dim() == 1
        assert torch.equal(found[tensor], value), tensor
