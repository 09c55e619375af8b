"""Mamba-2 layers whose state restarts at each document, and the layer spec of the hybrid."""

from __future__ import annotations

from typing import Any

import torch
from megatron.core.fusions.fused_bias_dropout import get_bias_dropout_add
from megatron.core.ssm import mamba_mixer
from megatron.core.ssm.mamba_block import MambaStackSubmodules
from megatron.core.ssm.mamba_layer import MambaLayer, MambaLayerSubmodules
from megatron.core.ssm.mamba_mixer import MambaMixer, MambaMixerSubmodules
from megatron.core.transformer.attention import SelfAttention, SelfAttentionSubmodules
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.identity_op import IdentityOp
from megatron.core.transformer.mlp import MLP, MLPSubmodules
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_layer import TransformerLayerSubmodules
from torch import Tensor

from nano_pretrain.model.stack import HybridStack, PlacedMLPLayer, PlacedTransformerLayer, first_layer
from nano_pretrain.platform import Platform


class DocumentMixer(MambaMixer):
    """MambaMixer that hands the documents of a packed batch to the scan.

    megatron-core knows documents only as PackedSeqParams (batch 1, padding, no context parallelism without Transformer
    Engine's extension); a [batch, length] index beside the activations has none of these limits.
    """

    seq_idx: Tensor | None = None

    def _ssm_training(self, zxBCdt: Tensor, packed_seq_params: Any = None) -> Tensor:  # noqa: N803
        # packed_seq_params is None: documents come as seq_idx.
        return self.mix(zxBCdt, self.seq_idx)

    def mix(self, projected: Tensor, documents: Tensor | None) -> Tensor:
        """Convolution, scan, gate and norm.

        Args:
            projected: output of in_proj [length, batch, in_proj rows].
            documents: document of each token [batch, length], or None.

        Returns:
            [length, batch, d_inner].
        """
        y = mamba_mixer.mamba_split_conv1d_scan_combined(
            # mamba-ssm's kernels take it contiguous; the portable ones read and write any order.
            projected.transpose(0, 1).contiguous() if projected.is_cuda else projected.transpose(0, 1),
            self.cp.get_conv1d_weight().squeeze(1),
            self.cp.get_conv1d_bias(),
            self.cp.get_dt_bias().float(),
            -torch.exp(self.cp.get_A_log().float()),
            D=self.cp.get_D(),
            chunk_size=self.chunk_size,
            activation=self.activation,
            headdim=self.headdim,
            ngroups=self.cp.ngroups_local_tpcp,
            norm_before_gate=self.norm_before_gate,
            seq_idx=documents,
        )
        y = self.cp.post_conv_ssm(y.transpose(0, 1).contiguous())
        out: Tensor = self.norm(y)
        return out

    def _get_states_from_cache(self, inference_context: Any, batch_size: int, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Convolution and scan state of static inference; the scan's is FP32: errors in it add up over the text."""
        conv_state, ssm_state = super()._get_states_from_cache(inference_context, batch_size, **kwargs)
        if ssm_state.dtype != torch.float32:
            ssm_state = ssm_state.float()
            inference_context.key_value_memory_dict[self.layer_number] = (conv_state, ssm_state)
        return conv_state, ssm_state


class DocumentMambaLayer(MambaLayer):
    """MambaLayer that takes the documents where megatron-core passes an attention mask, which it ignores."""

    def forward(self, hidden_states: Tensor, attention_mask: Tensor | None = None, **kwargs: Any) -> Tensor:
        """[length, batch, hidden] and documents [batch, length] or None -> [length, batch, hidden]."""
        self.mixer.seq_idx = attention_mask
        out: Tensor = super().forward(hidden_states, **kwargs)
        return out


CHECKPOINT_NAMES = {
    "norm.": "mixer.in_proj.layer_norm_",
    "input_layernorm.": "self_attention.linear_qkv.layer_norm_",
    "pre_mlp_layernorm.": "mlp.linear_fc1.layer_norm_",
}
"""Norms that are modules of their own are saved under the names they have when fused into the linear that follows."""


def stack_spec(platform: Platform, conv_width: int, split: tuple[int, ...], position: int) -> ModuleSpec:
    """The spec of the hybrid's stack from the platform's modules; checkpoints have the same names on all platforms.

    Args:
        platform: the platform.
        conv_width: of the Mamba-2 layers' convolution.
        split: layers of each pipeline position.
        position: that of this rank.
    """
    place = {"first_layer": first_layer(split, position)}
    modules = platform.layer_modules()
    norm = modules.norm or IdentityOp
    names = CHECKPOINT_NAMES if modules.norm else {}
    mixer = ModuleSpec(
        module=DocumentMixer,
        params={"d_conv": conv_width},
        submodules=MambaMixerSubmodules(in_proj=modules.column_linear, out_proj=modules.row_linear),
    )
    attention = ModuleSpec(
        module=SelfAttention,
        params={"attn_mask_type": AttnMaskType.causal},
        submodules=SelfAttentionSubmodules(
            linear_qkv=modules.column_linear,
            core_attention=modules.core_attention,
            linear_proj=modules.row_linear,
        ),
    )
    mlp = ModuleSpec(
        module=MLP, submodules=MLPSubmodules(linear_fc1=modules.column_linear, linear_fc2=modules.row_linear)
    )
    add = get_bias_dropout_add
    return ModuleSpec(
        module=HybridStack,
        params={"split": split},
        submodules=MambaStackSubmodules(
            mamba_layer=ModuleSpec(
                module=DocumentMambaLayer,
                submodules=MambaLayerSubmodules(
                    norm=norm, mixer=mixer, mamba_bda=add, sharded_state_dict_keys_map=names
                ),
            ),
            attention_layer=ModuleSpec(
                module=PlacedTransformerLayer,
                params=place,
                submodules=TransformerLayerSubmodules(
                    input_layernorm=norm,
                    self_attention=attention,
                    self_attn_bda=add,
                    sharded_state_dict_keys_map=names,
                ),
            ),
            mlp_layer=ModuleSpec(
                module=PlacedMLPLayer,
                params=place,
                submodules=TransformerLayerSubmodules(
                    pre_mlp_layernorm=norm, mlp=mlp, mlp_bda=add, sharded_state_dict_keys_map=names
                ),
            ),
        ),
    )
