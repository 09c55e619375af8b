"""What the CUDA path and megatron-core call in the GPU libraries, against the published sources of these.

Names and arguments of every call; the libraries are parsed, and nothing of them runs.
"""

from __future__ import annotations

import ast
from inspect import Parameter, signature
from typing import Any

import pytest

from nano_pretrain.kernels import mamba
from nano_pretrain.platform.cuda_limits import CONVOLUTION_CHANNELS, CONVOLUTION_WIDTHS
from nano_pretrain.platform.limits import guard_chunk_scan, guard_split_scan
from nano_pretrain.recipe.rules_precision import MULTIPLE, TILE
from tests.platform.published import Published, release, versions
from tests.platform.sources import (
    PRODUCT,
    Passed,
    bound_names,
    calls,
    definition,
    imports,
    keys_written,
    megatron_source,
    parameters,
)


def newest_and_others(name: str) -> list[Any]:
    """Releases of a library; those that are not the newest are for `make test-full`."""
    *others, newest = versions(name)
    return [newest, *(pytest.param(version, marks=pytest.mark.full) for version in others)]


@pytest.fixture(scope="module", params=newest_and_others("transformer-engine"))
def engine(request: pytest.FixtureRequest) -> Published:
    return release("transformer-engine", request.param)


@pytest.fixture(scope="module", params=newest_and_others("mamba-ssm"))
def mamba_ssm(request: pytest.FixtureRequest) -> Published:
    return release("mamba-ssm", request.param)


@pytest.fixture(scope="module", params=newest_and_others("causal-conv1d"))
def causal_conv1d(request: pytest.FixtureRequest) -> Published:
    return release("causal-conv1d", request.param)


EXTENSIONS = "megatron.core.extensions.transformer_engine"
WITH_ENGINE = (
    EXTENSIONS,
    "megatron.core.fp8_utils",
    "megatron.core.optimizer",
    "megatron.core.optimizer.clip_grads",
    "megatron.core.optimizer.distrib_optimizer",
    "megatron.core.tensor_parallel.random",
    "megatron.core.transformer.cuda_graphs",
)
"""Modules of megatron-core on our way that import Transformer Engine."""

NOT_NEEDED = {
    "_SplitAlongDim",  # fused splitting of packed queries, keys and values; torch's function is the alternative
    "apply_rotary_pos_emb",  # the place before 2.0
    "cast_to_fp8",  # before 2.0
    "cpu_offload_v1",  # offloading of activations
    "general_gemm", "get_workspace",  # megatron-core's router of experts
    "post_all_gather_processing",  # from 2.10 on; before, FP8 weights get their second layout in the next forward pass
}  # fmt: skip
"""Imports that megatron-core can do without, and does without in these releases or in this model."""


def test_megatron_core_finds_what_it_imports_of_transformer_engine(engine: Published) -> None:
    wanted = {pair for module in WITH_ENGINE for pair in imports(megatron_source(module), "transformer_engine")}
    assert len(wanted) > 20
    missing = [
        f"{module}.{name}"
        for module, name in sorted(wanted)
        if not engine.has_module(f"{module}.{name}")
        and (not engine.has_module(module) or name not in bound_names(engine.module(module)))
    ]
    assert [name for name in missing if name.rpartition(".")[2] not in NOT_NEEDED] == []


BEFORE_1_5 = {"ub_atomic_gemm_ag", "ub_split_ag", "ub_atomic_gemm_rs", "ub_split_rs"}
"""Arguments that megatron-core passes to releases of Transformer Engine before 1.5."""

MODULES = {
    "TELayerNormColumnParallelLinear": ("transformer_engine.pytorch.module.layernorm_linear", "LayerNormLinear"),
    "TELinear": ("transformer_engine.pytorch.module.linear", "Linear"),
    "TEDotProductAttention": (
        "transformer_engine.pytorch.attention.dot_product_attention.dot_product_attention",
        "DotProductAttention",
    ),
}
"""megatron-core's class -> module and name of the one that it derives from."""


@pytest.mark.parametrize("name", MODULES)
def test_modules_take_the_arguments_of_megatron_cores(name: str, engine: Published) -> None:
    module, base = MODULES[name]
    constructor = definition(megatron_source(EXTENSIONS), f"{name}.__init__")
    (given,) = calls(constructor, "__init__")
    optional = keys_written(constructor, "extra_kwargs") - BEFORE_1_5
    # Written by `_get_extra_te_kwargs`, for the linears.
    optional |= {"params_dtype", "device"} if base.endswith("Linear") else set()
    passed = Passed(given.by_position, given.by_name | optional)
    assert passed.misfits(parameters(engine.module(module), f"{base}.__init__")) == set()


@pytest.mark.parametrize(
    ("name", "by_position", "by_name"),
    [
        ("TELayerNormColumnParallelLinear", 1, {"is_first_microbatch"}),
        ("TELinear", 1, {"is_first_microbatch"}),
        ("TEDotProductAttention", 4, {"attn_mask_type"}),
    ],
)
def test_modules_are_called_as_megatron_core_calls_them(
    name: str, by_position: int, by_name: set[str], engine: Published
) -> None:
    module, base = MODULES[name]
    forward = definition(megatron_source(EXTENSIONS), f"{name}.forward")
    assert {call.by_position for call in calls(forward, "forward")} == {by_position}
    assert by_name <= {key for name in ("forward", "dict") for call in calls(forward, name) for key in call.by_name}
    passed = Passed(by_position, frozenset(by_name))
    assert passed.misfits(parameters(engine.module(module), f"{base}.forward")) == set()


def test_context_parallelism_reaches_transformer_engines_attention() -> None:
    """megatron-core's attention layer hands its groups on; without `cp_comm_type` keys and values go in a ring."""
    attention = definition(megatron_source("megatron.core.transformer.attention"), "Attention.__init__")
    core = calls(attention, "core_attention")
    assert [{"pg_collection", "cp_comm_type"} <= call.by_name for call in core] == [True]
    constructor = definition(megatron_source(EXTENSIONS), "TEDotProductAttention.__init__")
    assert {"cp_group", "cp_global_ranks", "cp_stream", "cp_comm_type"} <= keys_written(constructor, "extra_kwargs")


def test_only_the_unfused_attention_has_fp32_and_it_has_no_context_parallelism(engine: Published) -> None:
    """What `check_attention` refuses."""
    text = engine.text("transformer_engine/pytorch/attention/dot_product_attention/utils.py")
    assert "Disabling UnfusedDotProductAttention as it does not support context parallelism" in text
    for fused in ("FlashAttention 2", "FlashAttention 3", "FusedAttention"):
        assert f"Disabling {fused} for unsupported qkv_dtype" in text


def test_fused_adam_takes_what_megatron_core_gives(engine: Published) -> None:
    optimizers = engine.module("transformer_engine.pytorch.optimizers.fused_adam")
    taken = parameters(optimizers, "FusedAdam.__init__")
    assert {"params", "lr", "weight_decay", "betas", "eps", "adam_w_mode"} <= set(taken.names)


def test_user_buffers_are_asked_for_as_transformer_engine_gives_them(engine: Published) -> None:
    base = engine.module("transformer_engine.pytorch.module.base")
    (given,) = calls(ast.parse((PRODUCT / "platform" / "cuda.py").read_text()), "initialize_ub")
    assert given.misfits(parameters(base, "initialize_ub")) == set()
    assert {"NONE", "FP8"} <= bound_names(ast.Module([definition(base, "UserBufferQuantizationMode")], []))


def test_user_buffers_gather_no_blocks_of_fp8(engine: Published) -> None:
    """What `tensor_overlap` refuses: all that is none of the quantisers asked for ends in an error."""
    fill = definition(engine.module("transformer_engine.pytorch.module.base"), "fill_userbuffers_buffer_for_all_gather")
    asked = [call for call in ast.walk(fill) if isinstance(call, ast.Call) and ast.unparse(call.func) == "isinstance"]
    taken = {ast.unparse(call.args[1]) for call in asked if ast.unparse(call.args[0]) == "quantizer"}
    assert taken == {"(Float8Quantizer, Float8CurrentScalingQuantizer)", "MXFP8Quantizer"}
    assert isinstance(fill.body[-1], ast.Raise)
    assert "Unsupported quantizer for Userbuffers" in ast.unparse(fill.body[-1])


def test_blocks_are_gathered_in_whole_tiles(engine: Published) -> None:
    """Why hidden size and tokens are multiples of `TILE` under sequence parallelism."""
    blocks = engine.module("transformer_engine.pytorch.tensor.float8_blockwise_tensor")
    quantizable = ast.unparse(definition(blocks, "Float8BlockQuantizer.is_quantizable"))
    assert "inp.shape[-1] % self.block_len != 0" in quantizable
    assert "math.prod(inp.shape[:-1]) % self.block_len != 0" in quantizable
    assert f"self.block_len = {TILE}" in ast.unparse(definition(blocks, "Float8BlockQuantizer.__init__"))
    gather = definition(engine.module("transformer_engine.pytorch.utils"), "assert_dim_for_all_gather")
    assert "assert quantizer.is_quantizable(tensor)" in ast.unparse(gather)
    for name in ("linear", "layernorm_linear"):
        assert calls(engine.module(f"transformer_engine.pytorch.module.{name}"), "assert_dim_for_all_gather")


def test_the_mixer_wants_rows_for_fp8_whether_or_not_its_layer_has_it() -> None:
    """What FP8 asks of the Mamba-2 layers that stay BF16."""
    mixer = ast.unparse(definition(megatron_source(MIXER), "MambaMixer.__init__"))
    rows = "(2 * self.d_inner + 2 * self.ngroups * self.d_state + self.nheads)"
    assert f"if self.config.fp8:\n        assert {rows} % {MULTIPLE} == 0" in mixer


def test_parameters_of_a_linear_have_the_names_of_our_checkpoints(engine: Published) -> None:
    """`weight`, and for a fused norm `layer_norm_weight`; see test_cuda_names.py."""
    for module, base, expected in [
        (*MODULES["TELayerNormColumnParallelLinear"], {"layer_norm_weight"}),
        ("transformer_engine.pytorch.ops.basic.rmsnorm", "RMSNorm", {"weight"}),
    ]:
        registered = {
            str(node.args[0].value)
            for node in ast.walk(definition(engine.module(module), base))
            if isinstance(node, ast.Call) and getattr(node.func, "attr", "") == "register_parameter"
            if isinstance(node.args[0], ast.Constant)
        }
        assert expected <= registered
    # Not split, a linear's weight is called so.
    for module, base in (MODULES["TELayerNormColumnParallelLinear"], MODULES["TELinear"]):
        constants = {n.value for n in ast.walk(definition(engine.module(module), base)) if isinstance(n, ast.Constant)}
        assert "weight" in constants


SCANS = "mamba_ssm.ops.triton.ssd_combined"
MIXER = "megatron.core.ssm.mamba_mixer"


def test_the_mixers_calls_fit_mamba_ssm(mamba_ssm: Published) -> None:
    layers, mixer = ast.parse((PRODUCT / "model" / "layers.py").read_text()), megatron_source(MIXER)
    for tree, module, name, called in [
        (layers, SCANS, "mamba_split_conv1d_scan_combined", "mamba_split_conv1d_scan_combined"),
        (mixer, SCANS, "mamba_chunk_scan_combined", "mamba_chunk_scan_combined"),
        (mixer, "mamba_ssm.ops.triton.selective_state_update", "selective_state_update", "selective_state_update"),
        (mixer, "mamba_ssm.ops.triton.layernorm_gated", "RMSNorm.__init__", "ExtendedRMSNorm"),
    ]:
        found = calls(tree, called)
        assert found
        for call in found:
            assert call.misfits(parameters(mamba_ssm.module(module), name)) == set(), name


KERNELS = {
    "mamba_split_conv1d_scan_combined": (SCANS, guard_split_scan),
    "mamba_chunk_scan_combined": (SCANS, guard_chunk_scan),
    "selective_state_update": ("mamba_ssm.ops.triton.selective_state_update", None),
}
"""Ours have these names too: where mamba-ssm's are, and their guard."""


@pytest.mark.parametrize("name", KERNELS)
def test_a_call_means_the_same_to_our_kernels_the_guards_and_mamba_ssm(name: str, mamba_ssm: Published) -> None:
    module, guard = KERNELS[name]
    theirs = parameters(mamba_ssm.module(module), name).names
    ours = list(signature(getattr(mamba, name)).parameters.values())
    first = tuple(p.name for p in ours if p.kind is Parameter.POSITIONAL_OR_KEYWORD)
    assert first == theirs[: len(first)]
    assert {p.name for p in ours} <= set(theirs)
    if guard:
        guarded = list(signature(guard(getattr(mamba, name)), follow_wrapped=False).parameters.values())
        assert first == tuple(p.name for p in guarded if p.kind is Parameter.POSITIONAL_OR_KEYWORD)
        assert {p.name for p in guarded if p.kind is Parameter.KEYWORD_ONLY} <= set(theirs)
        assert guarded[-1].kind is Parameter.VAR_KEYWORD


def test_megatron_core_passes_what_our_kernels_take() -> None:
    """By position no more than what mamba-ssm's and ours have in common, the rest by name."""
    ours = ast.parse((PRODUCT / "kernels" / "mamba.py").read_text())
    for name in KERNELS:
        found = calls(megatron_source(MIXER), name)
        assert found
        for call in found:
            assert call.misfits(parameters(ours, name)) == set()
            assert call.by_position <= len(definition(ours, name).args.args)


def test_mamba_ssm_and_causal_conv1d_fit_together(mamba_ssm: Published, causal_conv1d: Published) -> None:
    functions = causal_conv1d.module("causal_conv1d.cpp_functions")
    scans = mamba_ssm.module(SCANS)
    assert ("causal_conv1d.cpp_functions", "causal_conv1d_fwd_function") in set(imports(scans, "causal_conv1d"))
    for name in ("causal_conv1d_fwd_function", "causal_conv1d_bwd_function"):
        found = calls(scans, name)
        assert found
        for call in found:
            assert call.misfits(parameters(functions, name)) == set(), name


def test_rows_that_causal_conv1d_refuses_are_copied_before(mamba_ssm: Published) -> None:
    """The 12B on TP8 x CP16 has 417 rows: a multiple of 8 is what the convolution's strides have to be."""
    text = mamba_ssm.text("mamba_ssm/ops/triton/ssd_combined.py")
    assert "% 8" in text
    # The split function, forward and backward, and its recomputation.
    assert len(calls(ast.parse(text), "ensure_stride") + calls(ast.parse(text), "rearrange_and_update_stride")) >= 4


def test_the_mixers_calls_fit_causal_conv1d(causal_conv1d: Published) -> None:
    interface = causal_conv1d.module("causal_conv1d.causal_conv1d_interface")
    for name in ("causal_conv1d_fn", "causal_conv1d_update"):
        for call in calls(megatron_source(MIXER), name):
            assert call.misfits(parameters(interface, name)) == set(), name
    varlen = causal_conv1d.module("causal_conv1d.causal_conv1d_varlen")
    for call in calls(megatron_source(MIXER), "causal_conv1d_varlen_states"):
        assert call.misfits(parameters(varlen, "causal_conv1d_varlen_states")) == set()


def test_what_causal_conv1d_demands_is_what_we_check_and_give() -> None:
    """Also of `seq_idx`, which the loader makes: see `test_documents_reach_the_kernel_as_it_wants_them`."""
    # Older archives leave the C++ out.
    text = release("causal-conv1d", versions("causal-conv1d")[-1]).text("csrc/causal_conv1d.cpp")
    least, largest = CONVOLUTION_WIDTHS
    assert f"width >= {least} && width <= {largest}" in text
    assert f"dim % {CONVOLUTION_CHANNELS} == 0" in text
    for demand in (
        "seq_idx.scalar_type() == torch::kInt32",
        "seq_idx.is_contiguous()",
        "CHECK_SHAPE(seq_idx, batch_size, seqlen)",
    ):
        assert demand in text
