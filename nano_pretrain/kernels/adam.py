"""AdamW with the state layout of NVIDIA's FusedAdam, for machines without Transformer Engine."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch


class FusedAdam(torch.optim.Optimizer):
    """AdamW (Loshchilov and Hutter 2019) whose `step` belongs to the parameter group.

    That is FusedAdam's layout in apex and Transformer Engine. megatron-core's distributed optimizer shards `exp_avg`
    and `exp_avg_sq` and keeps the group's `step` as common state; with `torch.optim.AdamW`, where `step` is a tensor of
    each parameter, a resumed run counts it wrongly.

    Args:
        params: parameters or parameter groups.
        lr: learning rate.
        betas: decay of the two moments.
        eps: added to the square root of the second moment.
        weight_decay: decoupled weight decay.
        adam_w_mode: must be true.

    Raises:
        ValueError: adam_w_mode is false.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        adam_w_mode: bool = True,
    ) -> None:
        if not adam_w_mode:
            raise ValueError("FusedAdam decays weights decoupled from the gradient (adam_w_mode=True)")
        super().__init__(params, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        """One update of every parameter that has a gradient."""
        for group in self.param_groups:
            group["step"] = group.get("step", 0) + 1
            params = [p for p in group["params"] if p.grad is not None]
            if params:
                self._update(group, params, [p.grad for p in params])

    def _update(self, group: dict[str, Any], params: list[torch.Tensor], grads: list[torch.Tensor]) -> None:
        for p in params:
            state = self.state[p]
            if "exp_avg" not in state:
                state["exp_avg"] = torch.zeros_like(p)
                state["exp_avg_sq"] = torch.zeros_like(p)
        torch._fused_adamw_(
            params,
            grads,
            [self.state[p]["exp_avg"] for p in params],
            [self.state[p]["exp_avg_sq"] for p in params],
            [],
            [torch.tensor(float(group["step"])) for _ in params],
            lr=group["lr"],
            beta1=group["betas"][0],
            beta2=group["betas"][1],
            weight_decay=group["weight_decay"],
            eps=group["eps"],
            amsgrad=False,
            maximize=False,
        )
