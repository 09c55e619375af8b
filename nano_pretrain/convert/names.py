"""The one table of tensors: which rows of our checkpoints each tensor of a Hugging Face checkpoint is made of.

A native checkpoint has a tensor for each part that tensor parallelism divides by itself (z, x, B, C and dt of in_proj;
x, B and C of the convolution), the query, key and value heads of an attention layer interleaved by group, each norm
under the linear that follows it, and a padded vocabulary. All of that moves rows, the first dimension, and nothing
else. Names: NVIDIA's released Nemotron-H and Nemotron Nano 2 checkpoints; transformers reads `backbone.` as `model.`.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate

from nano_pretrain.recipe.derived import padded_vocab_size
from nano_pretrain.recipe.schema import ModelConfig

EMBEDDING, HEAD, FINAL_NORM = "embedding.word_embeddings.weight", "output_layer.weight", "decoder.final_norm.weight"


@dataclass(frozen=True)
class Part:
    """Rows [start, start + count) of a tensor are rows [source_start, source_start + count) of the tensor `source`."""

    start: int
    source: str
    source_start: int
    count: int


@dataclass(frozen=True)
class Target:
    """A tensor that is made of rows of others.

    Attributes:
        name: its name.
        shape: its shape.
        parts: what it is made of, ascending; rows that no part covers are zero.
    """

    name: str
    shape: tuple[int, ...]
    parts: tuple[Part, ...]


def hf_tensors(model: ModelConfig) -> list[Target]:
    """Every tensor of a Hugging Face checkpoint of this model, made of those of a native one."""
    vocabulary = model.vocab_size
    return [
        _same("backbone.embeddings.weight", EMBEDDING, (vocabulary, model.hidden_size)),
        *(tensor for number in range(len(model.pattern)) for tensor in layer_tensors(model, number)),
        _same("backbone.norm_f.weight", FINAL_NORM, (model.hidden_size,)),
        _same("lm_head.weight", HEAD, (vocabulary, model.hidden_size)),
    ]


def layer_tensors(model: ModelConfig, number: int) -> list[Target]:
    """Those of layer `number`, counted from 0."""
    of = {"M": _mamba, "-": _mlp, "*": _attention}[model.pattern[number]]
    return list(of(model, f"backbone.layers.{number}.", f"decoder.layers.{number}."))


def native_tensors(model: ModelConfig) -> list[Target]:
    """Every tensor of a native checkpoint of this model, made of those of a Hugging Face checkpoint."""
    parts: dict[str, list[Part]] = {}
    rest: dict[str, tuple[int, ...]] = {}
    for tensor in hf_tensors(model):
        for part in tensor.parts:
            inverse = Part(part.source_start, tensor.name, part.start, part.count)
            parts.setdefault(part.source, []).append(inverse)
            rest[part.source] = tensor.shape[1:]
    return [_native(name, sorted(of, key=lambda part: part.start), rest[name], model) for name, of in parts.items()]


def _native(name: str, parts: list[Part], rest: tuple[int, ...], model: ModelConfig) -> Target:
    rows = padded_vocab_size(model) if name in (EMBEDDING, HEAD) else parts[-1].start + parts[-1].count
    return Target(name, (rows, *rest), tuple(parts))


def _mamba(model: ModelConfig, theirs: str, ours: str) -> Iterator[Target]:
    heads, hidden = model.mamba_num_heads, model.hidden_size
    inner, shared = heads * model.mamba_head_dim, model.mamba_num_groups * model.mamba_state_dim
    convolved = {"x": inner, "B": shared, "C": shared}
    yield _same(f"{theirs}norm.weight", f"{ours}mixer.in_proj.layer_norm_weight", (hidden,))
    for name, components, rest in (
        ("in_proj.weight", {"z": inner, **convolved, "dt": heads}, (hidden,)),
        ("conv1d.weight", convolved, (1, model.mamba_conv_width)),
        ("conv1d.bias", convolved, ()),
    ):
        rows = [(f"{ours}mixer.{name}.{part}", 0, count) for part, count in components.items()]
        yield _joined(f"{theirs}mixer.{name}", rows, rest)
    for name, shape in (
        *((name, (heads,)) for name in ("A_log", "D", "dt_bias")),
        ("norm.weight", (inner,)),
        ("out_proj.weight", (hidden, inner)),
    ):
        yield _same(f"{theirs}mixer.{name}", f"{ours}mixer.{name}", shape)


def _mlp(model: ModelConfig, theirs: str, ours: str) -> Iterator[Target]:
    hidden, ffn = model.hidden_size, model.ffn_hidden_size
    yield _same(f"{theirs}norm.weight", f"{ours}mlp.linear_fc1.layer_norm_weight", (hidden,))
    yield _same(f"{theirs}mixer.up_proj.weight", f"{ours}mlp.linear_fc1.weight", (ffn, hidden))
    yield _same(f"{theirs}mixer.down_proj.weight", f"{ours}mlp.linear_fc2.weight", (hidden, ffn))


def _attention(model: ModelConfig, theirs: str, ours: str) -> Iterator[Target]:
    hidden, channels = model.hidden_size, model.head_dim
    queries = model.num_attention_heads // model.num_query_groups
    yield _same(f"{theirs}norm.weight", f"{ours}self_attention.linear_qkv.layer_norm_weight", (hidden,))
    # For each group its query heads, its key head, its value head.
    starts = [group * (queries + 2) * channels for group in range(model.num_query_groups)]
    for letter, first, heads in (("q", 0, queries), ("k", queries, 1), ("v", queries + 1, 1)):
        fused = f"{ours}self_attention.linear_qkv.weight"
        rows = [(fused, start + first * channels, heads * channels) for start in starts]
        yield _joined(f"{theirs}mixer.{letter}_proj.weight", rows, (hidden,))
    shape = (hidden, model.num_attention_heads * channels)
    yield _same(f"{theirs}mixer.o_proj.weight", f"{ours}self_attention.linear_proj.weight", shape)


def _same(theirs: str, ours: str, shape: tuple[int, ...]) -> Target:
    return _joined(theirs, [(ours, 0, shape[0])], shape[1:])


def _joined(name: str, rows: Sequence[tuple[str, int, int]], rest: tuple[int, ...]) -> Target:
    """Rows of native tensors, (tensor, first row, how many), one after the other."""
    starts = accumulate((count for _, _, count in rows), initial=0)
    parts = tuple(Part(start, *where) for start, where in zip(starts, rows, strict=False))
    return Target(name, (sum(count for _, _, count in rows), *rest), parts)


def shape_text(shape: tuple[int, ...] | None) -> str:
    """For a message."""
    return "missing" if shape is None else "x".join(map(str, shape))
