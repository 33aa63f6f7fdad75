"""Tiny random models of every family, saved in the architecture's own format."""

from pathlib import Path

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

_COMMON = {
    "vocab_size": 128,
    "hidden_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "tie_word_embeddings": False,
}
_MLA = {
    "num_key_value_heads": 4,
    "q_lora_rank": 16,
    "kv_lora_rank": 16,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 8,
    "v_head_dim": 8,
    "head_dim": 8,
}
_DEEPSEEK_V3 = {
    "moe_intermediate_size": 16,
    "intermediate_size": 48,
    "n_routed_experts": 8,
    "n_shared_experts": 2,
    "num_experts_per_tok": 3,
    "n_group": 4,
    "topk_group": 2,
    "routed_scaling_factor": 2.5,
    "norm_topk_prob": True,
    "first_k_dense_replace": 1,
}

_GRANITE = {
    "intermediate_size": 16,
    "num_local_experts": 6,
    "num_experts_per_tok": 2,
    "residual_multiplier": 0.5,
    "logits_scaling": 2.0,
    "embedding_multiplier": 3.0,
    "attention_multiplier": 0.25,
}

TINY: dict[str, dict] = {
    "mixtral": {
        "intermediate_size": 24,
        "num_local_experts": 5,
        "num_experts_per_tok": 2,
    },
    "qwen2_moe": {
        "intermediate_size": 48,
        "moe_intermediate_size": 16,
        "shared_expert_intermediate_size": 40,
        "num_experts": 6,
        "num_experts_per_tok": 2,
        "norm_topk_prob": True,
        "mlp_only_layers": [1],
        "tie_word_embeddings": True,
    },
    "qwen3_moe": {
        "head_dim": 8,
        "intermediate_size": 48,
        "moe_intermediate_size": 16,
        "num_experts": 8,
        "num_experts_per_tok": 3,
        "norm_topk_prob": True,
        "decoder_sparse_step": 2,
        "num_hidden_layers": 4,
    },
    "olmoe": {
        "intermediate_size": 16,
        "num_experts": 8,
        "num_experts_per_tok": 3,
        "norm_topk_prob": False,
    },
    "flex_olmo": {
        "intermediate_size": 16,
        "num_experts": 5,
        "num_experts_per_tok": 3,
        "norm_topk_prob": False,
    },
    "deepseek_v2": {
        **_MLA,
        "intermediate_size": 48,
        "moe_intermediate_size": 16,
        "n_routed_experts": 8,
        "n_shared_experts": 2,
        "num_experts_per_tok": 3,
        "topk_method": "group_limited_greedy",
        "n_group": 4,
        "topk_group": 2,
        "routed_scaling_factor": 1.5,
        "first_k_dense_replace": 1,
    },
    "deepseek_v3": {**_MLA, **_DEEPSEEK_V3},
    "deepseek_v32": {
        **_MLA,
        **_DEEPSEEK_V3,
        "index_topk": 8,
        "index_n_heads": 8,
        "index_head_dim": 16,
    },
    "glm4_moe_lite": {**_MLA, **_DEEPSEEK_V3},
    "glm4_moe": {**_DEEPSEEK_V3, "head_dim": 8, "partial_rotary_factor": 0.5},
    "dots1": {**_DEEPSEEK_V3, "head_dim": 8},
    "granitemoe": _GRANITE,
    "granitemoe_swa": {**_GRANITE, "sliding_window": 8},
    "granitemoeshared": {**_GRANITE, "shared_intermediate_size": 24},
    "gpt_oss": {
        "head_dim": 8,
        "intermediate_size": 16,
        "num_local_experts": 6,
        "num_experts_per_tok": 3,
        "sliding_window": 8,
        "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
    },
    "ernie4_5_moe": {
        "intermediate_size": 48,
        "moe_intermediate_size": 16,
        "moe_num_experts": 8,
        "moe_k": 3,
        "moe_num_shared_experts": 1,
        "moe_layer_start_index": 1,
        "moe_layer_end_index": 2,
    },
    "qwen3_next": {
        "head_dim": 8,
        "intermediate_size": 48,
        "moe_intermediate_size": 16,
        "shared_expert_intermediate_size": 24,
        "num_experts": 8,
        "num_experts_per_tok": 3,
        "linear_num_value_heads": 4,
        "linear_num_key_heads": 2,
        "linear_key_head_dim": 8,
        "linear_value_head_dim": 8,
        "layer_types": ["linear_attention", "full_attention", "linear_attention"],
    },
}
"""model_type -> what its configuration states beyond _COMMON."""


def tiny_config(model_type: str, **overrides):
    """The configuration of the tiny model of a family."""
    return AutoConfig.for_model(model_type, **{**_COMMON, **TINY[model_type], **overrides})


def save_tiny(folder: Path, model_type: str, seed: int = 0, **overrides) -> PreTrainedModel:
    """Save a random model of `model_type` to `folder` in shards; returns it, fp32, in eval mode.

    Every tensor is drawn from a wide distribution, so that routing is decided, norms and biases matter
    and a tensor that is read from the wrong place changes the logits.
    """
    config = tiny_config(model_type, **overrides)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, tensor in model.state_dict().items():
            if not tensor.is_floating_point():
                continue
            noise = torch.randn(tensor.shape, generator=generator)
            if tensor.dim() == 1 and "norm" in name:
                tensor.copy_(1 + 0.2 * noise)
            else:
                fan_in = tensor.shape[-1] if tensor.dim() > 1 else 1
                tensor.copy_(noise * (0.2 if tensor.dim() == 1 else 1.5 / fan_in**0.5))
    model.save_pretrained(folder, max_shard_size="100KB")
    return model
