"""Checkpoints to convert: of a built model, and of random tensors under transformers' names."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from nano_pretrain.checkpoint.manifest import Manifest, file_entries
from nano_pretrain.checkpoint.sharded import sharded_state
from nano_pretrain.convert.export import export
from nano_pretrain.convert.importing import import_checkpoint
from nano_pretrain.convert.names import hf_tensors
from nano_pretrain.platform import current_platform
from nano_pretrain.recipe.schema import HfConfig, ModelConfig, Recipe

TOKENS = 64


def saved(model: Any, run_dir: Path, optimizer: Any = None) -> Path:
    """The checkpoint of a model, as megatron-core writes it."""
    from megatron.core import dist_checkpointing

    path = run_dir / "checkpoints" / str(TOKENS)
    path.mkdir(parents=True)
    with current_platform().optimizer_scope():
        dist_checkpointing.save(sharded_state(model, optimizer, loading=False), str(path))
    entries = file_entries(path, [file.name for file in path.iterdir()])
    Manifest(TOKENS, 1, {}, {}, "", entries).write(path)
    return path


def exported(recipe: Recipe, checkpoint: Path, to: Path, **options: Any) -> Path:
    """The directory of its export, unverified."""
    asked = HfConfig(**{"path": str(to), "dtype": "fp32", "verify": False, **options})
    export(recipe, asked, checkpoint.parent.parent, checkpoint)
    return to


def imported(recipe: Recipe, source: Path, run_dir: Path, **options: Any) -> Path:
    """The checkpoint of its import, unverified."""
    import_checkpoint(recipe, HfConfig(**{"verify": False, **options}), source, run_dir)
    return run_dir / "checkpoints" / "0"


def random_tensors(model: ModelConfig, dtype: torch.dtype = torch.float32, seed: int = 0) -> dict[str, Tensor]:
    """A tensor for each name and shape of a checkpoint, no two rows alike."""
    generator = torch.Generator().manual_seed(seed)
    return {tensor.name: torch.randn(tensor.shape, generator=generator).to(dtype) for tensor in hf_tensors(model)}


def write_hf(directory: Path, tensors: Mapping[str, Tensor]) -> Path:
    """A checkpoint of one file, by the library's own writer."""
    directory.mkdir(parents=True)
    save_file(dict(tensors), directory / "model.safetensors")
    return directory


def tensors_of(directory: Path) -> dict[str, Tensor]:
    """All tensors of a checkpoint, by the library's own reader."""
    return {
        name: tensor for file in sorted(directory.glob("*.safetensors")) for name, tensor in load_file(file).items()
    }


def assert_equal(found: Mapping[str, Tensor], wanted: Mapping[str, Tensor]) -> None:
    """Same names, dtypes and bits."""
    assert list(found) == list(wanted) or sorted(found) == sorted(wanted)
    for name, tensor in wanted.items():
        assert found[name].dtype == tensor.dtype, name
        assert torch.equal(found[name], tensor), name


def with_model(recipe: Recipe, **model: Any) -> Recipe:
    """The recipe with other fields of the model."""
    return replace(recipe, model=replace(recipe.model, **model))
