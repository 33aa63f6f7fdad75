"""Published configurations of well-known bases: what their `config.json` states beyond the defaults."""

from typing import Any

MIXTRAL_8X7B: dict[str, Any] = {
    "vocab_size": 32000, "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32,
    "num_attention_heads": 32, "num_key_value_heads": 8, "num_local_experts": 8,
    "num_experts_per_tok": 2, "tie_word_embeddings": False,
}  # fmt: skip
MIXTRAL_8X22B: dict[str, Any] = {
    **MIXTRAL_8X7B, "hidden_size": 6144, "intermediate_size": 16384, "num_hidden_layers": 56,
    "num_attention_heads": 48,
}  # fmt: skip
OLMOE: dict[str, Any] = {
    "vocab_size": 50304, "hidden_size": 2048, "intermediate_size": 1024, "num_hidden_layers": 16,
    "num_attention_heads": 16, "num_key_value_heads": 16, "num_experts": 64,
    "num_experts_per_tok": 8, "norm_topk_prob": False, "tie_word_embeddings": False,
}  # fmt: skip
QWEN3_30B: dict[str, Any] = {
    "vocab_size": 151936, "hidden_size": 2048, "intermediate_size": 6144, "num_hidden_layers": 48,
    "num_attention_heads": 32, "num_key_value_heads": 4, "head_dim": 128, "num_experts": 128,
    "moe_intermediate_size": 768, "num_experts_per_tok": 8, "decoder_sparse_step": 1,
    "tie_word_embeddings": False,
}  # fmt: skip
DEEPSEEK_V2_LITE: dict[str, Any] = {
    "vocab_size": 102400, "hidden_size": 2048, "intermediate_size": 10944,
    "moe_intermediate_size": 1408, "num_hidden_layers": 27, "num_attention_heads": 16,
    "num_key_value_heads": 16, "n_shared_experts": 2, "n_routed_experts": 64, "kv_lora_rank": 512,
    "q_lora_rank": None, "qk_rope_head_dim": 64, "v_head_dim": 128, "qk_nope_head_dim": 128,
    "topk_method": "greedy", "num_experts_per_tok": 6, "first_k_dense_replace": 1,
    "tie_word_embeddings": False,
}  # fmt: skip
DEEPSEEK_V3: dict[str, Any] = {
    "vocab_size": 129280, "hidden_size": 7168, "intermediate_size": 18432,
    "moe_intermediate_size": 2048, "num_hidden_layers": 61, "num_attention_heads": 128,
    "num_key_value_heads": 128, "n_shared_experts": 1, "n_routed_experts": 256,
    "kv_lora_rank": 512, "q_lora_rank": 1536, "qk_rope_head_dim": 64, "v_head_dim": 128,
    "qk_nope_head_dim": 128, "n_group": 8, "topk_group": 4, "num_experts_per_tok": 8,
    "first_k_dense_replace": 3, "tie_word_embeddings": False,
}  # fmt: skip
GPT_OSS_20B: dict[str, Any] = {"num_hidden_layers": 24, "num_local_experts": 32}
GPT_OSS_120B: dict[str, Any] = {"num_hidden_layers": 36, "num_local_experts": 128}

BASES: dict[str, tuple[str, dict[str, Any], float]] = {
    "OLMoE-1B-7B": ("olmoe", OLMOE, 6.92),
    "DeepSeek-V2-Lite": ("deepseek_v2", DEEPSEEK_V2_LITE, 15.7),
    "GPT-OSS-20B": ("gpt_oss", GPT_OSS_20B, 20.9),
    "Qwen3-30B-A3B": ("qwen3_moe", QWEN3_30B, 30.5),
    "Mixtral-8x7B": ("mixtral", MIXTRAL_8X7B, 46.7),
    "GPT-OSS-120B": ("gpt_oss", GPT_OSS_120B, 116.8),
    "Mixtral-8x22B": ("mixtral", MIXTRAL_8X22B, 140.6),
    "DeepSeek-V3": ("deepseek_v3", DEEPSEEK_V3, 671.0),
}
"""Name -> (model_type, dimensions, published billions of parameters), the smallest first."""
