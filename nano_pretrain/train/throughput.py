"""Tokens per second and model FLOPs utilisation of a step."""

from __future__ import annotations

from nano_pretrain.data.stage_plan import StagePlan
from nano_pretrain.parallel.groups import all_ranks_max
from nano_pretrain.recipe.flops import count_flops
from nano_pretrain.train.session import Session


class Throughput:
    """Speed against the dense peak of all ranks.

    The peak is `cluster.peak_tflops` where given; else measured with matrix products on a CPU, while all ranks do the
    same, or looked up for the GPU. The largest of all ranks counts.

    Args:
        session: the run.
    """

    def __init__(self, session: Session) -> None:
        self.session = session
        stated = session.recipe.cluster.peak_tflops
        parameter = next(p for p in session.trainable.model.parameters() if p.dim() > 1)
        peak = stated * 1e12 if stated else session.platform.peak_flops(parameter.dtype) or 0.0
        self.peak_flops = all_ranks_max(peak, parameter.device) * session.ranks.world_size

    def measure(self, stage: StagePlan, samples: int, seconds: float) -> tuple[float, float | None]:
        """Tokens per second of a step over all ranks, and the model FLOPs' share of the peak, if that is known."""
        speed = samples * stage.sequence_length / seconds
        flops = count_flops(self.session.recipe.model, stage.sequence_length).training
        return speed, speed * flops / self.peak_flops if self.peak_flops else None
