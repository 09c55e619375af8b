"""What ranks do in the tests of attention under context parallelism."""

from __future__ import annotations

from types import SimpleNamespace

import torch
import torch.distributed as dist
from torch import Tensor

from nano_pretrain.kernels.attention import CausalAttention
from nano_pretrain.kernels.native import library
from nano_pretrain.parallel.context import own_tokens
from tests.kernels.compare import Inputs, values_and_gradients
from tests.kernels.implementations import Results


def attention_of_own_tokens(implementation: str, cases: list[tuple[Inputs, Tensor]]) -> list[Results]:
    """Outputs and gradients of this rank's tokens, from whole inputs and gradients of the whole output, in float64."""
    torch.set_flush_denormal(True)
    dist.init_process_group("gloo")
    group = dist.group.WORLD
    assert group is not None
    place = (group.rank(), group.size())
    attention = CausalAttention(config=None, layer_number=1, pg_collection=SimpleNamespace(cp=group))
    results = []
    with library.implementation(implementation):
        for whole, gradient in cases:
            own = {name: own_tokens(whole[name], 0, place) for name in ("query", "key", "value")}

            def attend(
                query: Tensor, key: Tensor, value: Tensor, documents: Tensor | None = whole["documents"]
            ) -> Tensor:
                answer: Tensor = attention(query, key, value, documents)
                return answer

            found = values_and_gradients(attend, own, [own_tokens(gradient, 0, place)])
            assert {t.dtype for t in found.values()} == {whole["query"].dtype}
            results.append({name: t.double() for name, t in found.items()})
    dist.destroy_process_group()
    return results
