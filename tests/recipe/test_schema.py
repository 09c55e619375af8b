"""The schema: every field is documented, and says what a resumed run may do with it."""

from __future__ import annotations

from dataclasses import Field, fields, is_dataclass
from typing import Any

import pytest

from nano_pretrain.recipe import schema

NODES = [node for node in vars(schema).values() if isinstance(node, type) and is_dataclass(node)]
FIELDS = [(f"{node.__name__}.{item.name}", item) for node in NODES for item in fields(node)]


@pytest.mark.parametrize("node", NODES)
def test_node_has_a_sentence(node: type) -> None:
    assert node.__doc__
    assert node.__doc__.strip().endswith(".")


@pytest.mark.parametrize(("name", "item"), FIELDS, ids=[name for name, _ in FIELDS])
def test_field_has_a_sentence_and_a_resume_class(name: str, item: Field[Any]) -> None:
    assert item.metadata["doc"].strip().endswith(".")
    assert item.metadata["doc"].count("\n") == 0
    assert isinstance(item.metadata["resume"], schema.Resume)


def test_what_is_learned_is_not_free() -> None:
    named = dict(FIELDS)
    for name in (
        "ModelConfig.pattern",
        "PrecisionConfig.name",
        "OptimizerConfig.eps",
        "RunConfig.seed",
        "DataConfig.seed",
    ):
        assert named[name].metadata["resume"] == schema.Resume.FIXED
    assert all(
        item.metadata["resume"] == schema.Resume.FIXED for name, item in FIELDS if name.startswith("ModelConfig")
    )
