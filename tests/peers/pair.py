"""Our model and transformers' with the same weights."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from nano_pretrain.data.loader import MicroBatch
from nano_pretrain.platform import Platform
from tests.model.building import build, logits, losses
from tests.peers.nemotron_h import EMBEDDING, HEAD, peer, peer_tensors
from tests.peers.shapes import Shape

SPREAD = 0.2
"""Added to norms, D, A_log, dt_bias and the convolution's bias: ones would hide mistakes.

The matrices keep their initial size. Larger ones drive `D + dt C B` of a group with one head through zero at the first
token of a sample, where the norm leaves nothing of it but its sign: there fp32 moves gradients by 1e-3, against float64
in both implementations alike.
"""


class Pair:
    """Our fp32 model and its peer with the same weights, every one of them random but the zeros of the padding.

    Args:
        platform: the platform.
        shape: the model's shape.
    """

    def __init__(self, platform: Platform, shape: Shape) -> None:
        self.shape = shape
        self.recipe = shape.recipe()
        self.model = build(platform, self.recipe, shape.length)
        self._spread(torch.Generator().manual_seed(0))
        self.peer = peer(shape.model)
        self.peer.load_state_dict(self.named(lambda p: p.detach()), strict=True)

    @torch.no_grad()
    def _spread(self, generator: torch.Generator) -> None:
        for parameter in self.model.parameters():
            if parameter.dim() == 1:
                parameter.add_(torch.randn(parameter.shape, generator=generator), alpha=SPREAD)

    def named(self, of: Callable[[Any], Tensor]) -> dict[str, Tensor]:
        """`of` our parameters, under transformers' names."""
        return peer_tensors({name: of(p) for name, p in self.model.named_parameters()}, self.shape.model)

    def padding(self) -> Tensor:
        """Our rows of the vocabulary padding, of embedding and head."""
        parameters = dict(self.model.named_parameters())
        return torch.cat([parameters[name].detach()[self.shape.model.vocab_size :] for name in (EMBEDDING, HEAD)])

    def ours(self, micro_batch: MicroBatch) -> dict[str, Tensor]:
        """Logits, mean loss and its gradient by each of our parameters, under transformers' names."""
        found = logits(self.model, micro_batch.tokens)[..., : self.shape.model.vocab_size]
        loss = losses(self.model, micro_batch).mean()
        loss.backward()
        return {"logits": found, "loss": loss.detach(), **self.named(lambda p: p.grad)}

    def theirs(self, micro_batch: MicroBatch) -> dict[str, Tensor]:
        """The same of the peer."""
        found = self.peer(micro_batch.tokens, use_cache=False).logits
        loss = mean_loss(found, micro_batch.labels)
        loss.backward()
        gradients = {name: p.grad for name, p in self.peer.named_parameters()}
        return {"logits": found.detach(), "loss": loss.detach(), **gradients}


def mean_loss(found: Tensor, labels: Tensor) -> Tensor:
    """Mean cross-entropy in nats of logits [batch, length, vocab] and labels [batch, length]."""
    return torch.nn.functional.cross_entropy(found.flatten(0, 1), labels.flatten())
