"""Everything a training process holds while it runs."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from nano_pretrain.data.curriculum import Curriculum
from nano_pretrain.data.shards import Corpus
from nano_pretrain.parallel.groups import Ranks, data_parallel_place
from nano_pretrain.plan.params import count_parameters
from nano_pretrain.platform import Platform
from nano_pretrain.recipe.derived import padded_vocab_size, parameter_dtype
from nano_pretrain.recipe.schema import ParallelConfig, Recipe

if TYPE_CHECKING:
    from nano_pretrain.train.step import Trainable


@dataclass
class Session:
    """The run in this process.

    Args:
        recipe: the recipe.
        directory: directory of the run.
        ranks: this process in the world.
        platform: the platform.
        corpus: the shards.
        curriculum: the order.
        layout: layout of the process groups.
        trainable: model and optimizer.
        tokens: tokens consumed.
        step: optimizer steps taken.
        quantisation: what TensorBoard and wandb get of the FP8 losses, if the last step counted them.
    """

    recipe: Recipe
    directory: Path
    ranks: Ranks
    platform: Platform
    corpus: Corpus
    curriculum: Curriculum
    layout: ParallelConfig
    trainable: Trainable
    tokens: int = 0
    step: int = 0
    quantisation: dict[str, float] = field(default_factory=dict)

    @property
    def finished(self) -> bool:
        """Whether all tokens are consumed."""
        return self.tokens >= self.curriculum.total_tokens

    @property
    def at_stage_end(self) -> bool:
        """Whether the last step was the last one of its stage."""
        return self.tokens > 0 and self.tokens == self.curriculum.stage_at(self.tokens - 1).end_tokens

    def checkpoint_bytes(self) -> int:
        """Room that a checkpoint needs: each parameter, its FP32 copy and two moments, and what the format adds."""
        model = self.recipe.model
        padded = replace(model, vocab_size=padded_vocab_size(model))
        itemsize = 4 if parameter_dtype(self.recipe.precision) == "float32" else 2
        return int(1.05 * count_parameters(padded).total * (itemsize + 12)) + 2**20

    def layout_summary(self) -> dict[str, Any]:
        """Sizes of the layout, for the manifest and the environment."""
        return {**asdict(self.layout), "data": data_parallel_place()[1], "world": self.ranks.world_size}


@dataclass(frozen=True)
class StepRecord:
    """One line of metrics.jsonl.

    Args:
        step: number of the step, from 1.
        tokens: tokens consumed after it.
        loss: mean training loss, nats per token.
        lr: learning rate of the step.
        grad_norm: global gradient norm before clipping.
        tokens_per_second: over all ranks.
        mfu: model FLOPs utilisation, share of the dense peak, or None where the peak is not known.
        stage: stage of the step.
        phase: phase of the step.
        sequence_length: tokens of a sample.
        global_batch_size: samples of the step.
    """

    step: int
    tokens: int
    loss: float
    lr: float
    grad_norm: float
    tokens_per_second: float
    mfu: float | None
    stage: str
    phase: str
    sequence_length: int
    global_batch_size: int


class Callback(Protocol):
    """Something that happens during a run; callbacks are called on every rank, in the order of their list."""

    def on_start(self, session: Session) -> None:
        """Before the first step of this process."""

    def on_step(self, session: Session, record: StepRecord, stopping: bool) -> None:
        """After a step; `stopping` if the loop ends after it."""

    def on_end(self, session: Session) -> None:
        """After the last step of this process, whatever ends it; called where `on_start` was."""
