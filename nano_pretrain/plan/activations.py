"""What a rank keeps of one micro-batch for the backward pass, and what that pass needs beside it.

`activations_cpu` and `activations_cuda` list the tensors of each layer; here are the sizes they are made of, and what
recomputation changes.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

from nano_pretrain.recipe.derived import mamba_shape, padded_vocab_size
from nano_pretrain.recipe.schema import ModelConfig, ParallelConfig


@dataclass(frozen=True)
class Sizes:
    """Bytes of the tensors of one micro-batch on one rank, each in the dtype of activations.

    A rank has `batch x sequence / context` tokens in its linears and attention heads, and of these, under sequence
    parallelism, 1 / tensor in the residual stream. Between the projections of a Mamba-2 layer it has the whole sequence
    of 1 / context of its heads, which are as many elements; but it has at least one group of B and C.

    Attributes:
        model: widths.
        layout: ranks.
        batch: samples of a micro-batch.
        sequence: tokens of a sample.
        element: bytes of an activation, 2 or 4.
        fp8: name of the FP8 recipe by which the layer's linears are quantised, or None.
        documents: whether states restart at each document.
    """

    model: ModelConfig
    layout: ParallelConfig
    batch: int
    sequence: int
    element: int
    fp8: str | None = None
    documents: bool = False

    @property
    def tokens(self) -> int:
        """Tokens in a linear."""
        return self.batch * self.sequence // self.layout.context

    @property
    def residual_tokens(self) -> int:
        """Tokens in the residual stream."""
        return self.tokens // self.layout.tensor if self.layout.sequence else self.tokens

    def width(self, channels: int) -> int:
        """A tensor [tokens, channels / tensor]."""
        return self.element * self.tokens * channels // self.layout.tensor

    def input_of_linear(self, tensor: int) -> int:
        """What a linear keeps of an input of so many bytes: all, or FP8 with a scale for 128 elements or for all."""
        if self.fp8 is None:
            return tensor
        elements = tensor // self.element
        return elements + (4 if self.fp8 == "fp8_current_scaling" else 4 * elements // 128)

    def per_token(self, numbers: int) -> int:
        """FP32 tensor [tokens, numbers / tensor]."""
        return 4 * self.tokens * numbers // self.layout.tensor

    @property
    def residual(self) -> int:
        """The residual stream [residual tokens, hidden]."""
        return self.element * self.residual_tokens * self.model.hidden_size

    @property
    def gathered(self) -> int:
        """A copy of the residual stream with all tokens, which only sequence parallelism makes."""
        return self.whole if self.layout.sequence else 0

    @property
    def whole(self) -> int:
        """[tokens, hidden]."""
        return self.element * self.tokens * self.model.hidden_size

    @property
    def inner(self) -> int:
        """z, x or y of a Mamba-2 layer [tokens, d_inner / tensor]."""
        return self.width(mamba_shape(self.model).inner)

    @property
    def groups(self) -> int:
        """Groups of B and C, counted as if they were divided among tensor- and context-parallel ranks."""
        return max(self.model.mamba_num_groups, self.layout.tensor * self.layout.context)

    @property
    def convolved(self) -> int:
        """x, B and C."""
        return self.inner + 2 * self.width(self.groups * self.model.mamba_state_dim)

    @property
    def projected(self) -> int:
        """z, x, B, C and dt: what leaves in_proj and reaches the scan."""
        return self.inner + self.convolved + self.width(self.model.mamba_num_heads)

    @property
    def ffn(self) -> int:
        """[tokens, ffn / tensor]."""
        return self.width(self.model.ffn_hidden_size)

    @property
    def queries(self) -> int:
        """Queries, or the output of attention."""
        return self.width(self.model.num_attention_heads * self.model.head_dim)

    @property
    def keys(self) -> int:
        """Keys, or values."""
        return self.width(self.model.num_query_groups * self.model.head_dim)

    @property
    def table_gradient(self) -> int:
        """The gradient of the embedding, or of the head's weight, before it joins the buffer."""
        return self.weight(padded_vocab_size(self.model), self.model.hidden_size)

    @property
    def logits(self) -> int:
        """[tokens, padded vocabulary / tensor]."""
        return self.width(padded_vocab_size(self.model))

    def weight(self, rows: int, columns: int) -> int:
        """The gradient of a weight [rows, columns] of which the rank holds 1 / tensor, before it joins the buffer."""
        return self.element * rows * columns // self.layout.tensor


@dataclass(frozen=True)
class LayerActivations:
    """Bytes of one layer for one micro-batch.

    Attributes:
        input: its input, which alone stays if the whole layer is computed again.
        kept: what it keeps, the input included, Mamba states not.
        states: Mamba states that it keeps.
        working: what its backward pass needs at its worst moment beside all that was kept until then.
        working_states: Mamba states among it, not counted in `working`.
        dropped: what selective recomputation takes out of `kept`.
        again: what selective recomputation adds to `working` beside what it dropped: the output of what is computed
            again is held twice, and its gradient longer.
    """

    input: int
    kept: int
    working: int
    states: int = 0
    working_states: int = 0
    dropped: int = 0
    again: int = 0

    def selective(self) -> LayerActivations:
        """Under selective recomputation."""
        if not self.dropped:
            return self
        return replace(
            self,
            kept=self.kept - self.dropped,
            states=0,
            working=self.working + self.dropped + self.again,
            working_states=self.working_states + self.states,
        )

    def full(self) -> LayerActivations:
        """Under full recomputation: all is there again during the layer's backward pass, and the layer's output."""
        return replace(
            self,
            kept=self.input,
            states=0,
            working=self.working + (self.kept - self.input) + self.input,  # its output is as large as its input
            working_states=self.working_states + self.states,
        )


RECOMPUTATION: dict[str, Callable[[LayerActivations], LayerActivations]] = {
    "none": lambda layer: layer,
    "selective": LayerActivations.selective,
    "full": LayerActivations.full,
}
"""By `recompute.granularity`."""


@dataclass(frozen=True)
class HeadActivations:
    """Bytes of final norm, output head and loss for one micro-batch.

    Attributes:
        kept: inputs of the final norm and of the head.
        logits: logits and what the loss makes of them, at its worst moment.
        working: what the head's backward pass needs beside them.
    """

    kept: int
    logits: int
    working: int
