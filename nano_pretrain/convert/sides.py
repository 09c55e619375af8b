"""Both sides of a conversion as its verification sees them: the tensors, our model and the configuration of theirs.

Our model is filled by megatron-core's own reader, which shares nothing with the one that conversions use.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributed.checkpoint.filesystem import FileSystemReader

from nano_pretrain.checkpoint.sharded import SHARDING
from nano_pretrain.convert.assemble import Source, blocks
from nano_pretrain.convert.hf_files import HfReader
from nano_pretrain.convert.names import Target, hf_tensors
from nano_pretrain.convert.native import MAIN_WEIGHTS, NativeReader
from nano_pretrain.evaluate.generate import ALONE
from nano_pretrain.parallel.groups import Ranks, process_groups
from nano_pretrain.platform import Platform, current_platform
from nano_pretrain.recipe.errors import RunError
from nano_pretrain.recipe.schema import ModelConfig, PrecisionConfig, Recipe

_BITS = {torch.bfloat16: torch.int16, torch.float32: torch.int32}


@dataclass(frozen=True)
class Sides:
    """A conversion that is written but not yet published.

    Attributes:
        recipe: of the run.
        hf: the Hugging Face checkpoint.
        native: the native checkpoint, read as the conversion reads it.
        checkpoint: its directory.
        exported: whether the Hugging Face checkpoint was made of the native one, else it is the other way round.
    """

    recipe: Recipe
    hf: HfReader
    native: NativeReader
    checkpoint: Path
    exported: bool

    @property
    def model(self) -> ModelConfig:
        """The model's shapes."""
        return self.recipe.model

    def dtype(self, target: Target) -> torch.dtype:
        """Dtype in which a tensor of the Hugging Face checkpoint was converted, that of the side that was written."""
        return self.hf.dtype(target.name) if self.exported else self.native.dtype(target.parts[0].source)

    def agreeing(self, target: Target, theirs: Source) -> Iterator[tuple[int, Tensor]]:
        """The rows of a tensor, which are the same on both sides, in blocks: first row and values.

        Args:
            target: the tensor.
            theirs: where the Hugging Face side is read.

        Raises:
            RunError: a bit differs, or a number is not finite.
        """
        start, dtype = 0, self.dtype(target)
        for block in blocks(target, self.native, dtype):
            _check_finite(target.name, start, block)
            found = theirs.rows(target.name, start, len(block)).to(dtype)
            _check_bits(target.name, start, found, block)
            yield start, block
            start += len(block)

    def check(self, target: Target) -> None:
        """Compare a tensor as it is stored.

        Raises:
            RunError: a bit differs.
        """
        for _ in self.agreeing(target, self.hf):
            pass

    def fill(self, shards: Mapping[str, Any], here: str = "", there: str = "") -> None:
        """Give parameters the values that were converted.

        Args:
            shards: of `shards`.
            here: in their names,
            there: what it is in the checkpoint.
        """
        from megatron.core import dist_checkpointing

        names = {key: key.replace(here, there) for key in shards}
        wanted = {key: replace(shard, key=self._exact(names[key])) for key, shard in shards.items()}
        loaded = dist_checkpointing.load(wanted, str(self.checkpoint))
        for key, shard in shards.items():
            shard.data.copy_(loaded[key].to(self._native_dtypes[names[key]]))

    def their_config(self) -> Any:
        """config.json as transformers reads it, without the clamp that it makes of a key in others' files.

        Raises:
            RunError: transformers does not take it.
        """
        from transformers import NemotronHConfig

        # convert/config.py says why.
        unclamped = {} if self.exported else {"time_step_min": 0.0}
        with loading(self.hf.directory):
            # Its other attention is causal only if it is given a mask, which a layer by itself is not.
            return NemotronHConfig.from_pretrained(
                self.hf.directory, local_files_only=True, attn_implementation="sdpa", **unclamped
            )

    def _exact(self, name: str) -> str:
        """The FP32 weight that a weight of the model was rounded from, where the checkpoint has it."""
        return MAIN_WEIGHTS + name if MAIN_WEIGHTS + name in self._stored else name

    @cached_property
    def _stored(self) -> Mapping[str, object]:
        entries: Mapping[str, object] = FileSystemReader(self.checkpoint).read_metadata().state_dict_metadata
        return entries

    @cached_property
    def _native_dtypes(self) -> dict[str, torch.dtype]:
        return {part.source: self.dtype(target) for target in hf_tensors(self.model) for part in target.parts}


@contextmanager
def loading(directory: Path) -> Iterator[None]:
    """Around what transformers loads: whatever it fails with is what is wrong with the checkpoint.

    Raises:
        RunError: it failed.
    """
    try:
        yield
    except Exception as error:
        said = next(iter(str(error).splitlines()), "")
        raise RunError(f"{directory}: transformers does not load it, {type(error).__name__}: {said}") from error


def _check_finite(name: str, start: int, block: Tensor) -> None:
    # A quarter of the time of looking at each number.
    if not all(bound.isfinite() for bound in torch.aminmax(block)):
        row, *rest = (~block.isfinite()).nonzero()[0].tolist()
        place = ", ".join(map(str, (start + row, *rest)))
        raise RunError(f"{name}[{place}]: {block[row, *rest]} is not finite, so nothing can be compared")


def _check_bits(name: str, start: int, theirs: Tensor, ours: Tensor) -> None:
    bits = _BITS[ours.dtype]
    wrong = theirs.contiguous().view(bits) != ours.view(bits)
    if not wrong.any():
        return
    row, *rest = wrong.nonzero()[0].tolist()
    place = ", ".join(map(str, (start + row, *rest)))
    raise RunError(
        f"{name}[{place}]: {theirs[row, *rest]:.9g} in the Hugging Face model, {ours[row, *rest]:.9g} in the native "
        f"checkpoint; so differ {int(wrong.sum())} of the {wrong.numel()} numbers of rows {start} to "
        f"{start + len(ours) - 1}"
    )


@contextmanager
def alone(recipe: Recipe) -> Iterator[Platform]:
    """The platform of one rank with its process groups, for models that are not trained."""
    platform = current_platform()
    platform.prepare(0, recipe.cluster.threads_per_rank, recipe.cluster.cpu_kernels)
    with process_groups(platform, Ranks(0, 1, 0), ALONE, recipe.cluster.timeout_seconds), torch.no_grad():
        yield platform


def our_model(recipe: Recipe, platform: Platform, longest: int, **model: Any) -> Any:
    """A model in FP32 with initial weights, within `alone`.

    Args:
        recipe: of the run.
        platform: that of `alone`.
        longest: most tokens of a sequence.
        **model: fields of the model that differ from the recipe's.
    """
    from nano_pretrain.model.hybrid import build_model

    exact = replace(recipe, model=replace(recipe.model, **model), precision=PrecisionConfig(name="fp32"))
    return build_model(exact, ALONE, platform, longest).eval()


def shards(model: Any) -> dict[str, Any]:
    """What a checkpoint holds of a model on one rank, by name there, as views of its parameters."""
    from megatron.core.dist_checkpointing.dict_utils import nested_values
    from megatron.core.dist_checkpointing.mapping import ShardedTensor, apply_factories

    state = model.sharded_state_dict(metadata=dict(SHARDING))
    apply_factories(state)
    return {shard.key: shard for shard in nested_values(state) if isinstance(shard, ShardedTensor)}
