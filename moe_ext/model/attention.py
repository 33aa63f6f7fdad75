"""Attention for training on short sequences on a processor: plain products, a block of queries at a
time, instead of the fused kernel.

Shape letters: B sequences, H query heads, K key/value heads, G = H / K query heads that share one,
S query positions, N key positions, C width of a head.

PyTorch's fused kernel for processors is quick forward and slow backward. Forward and backward of one
layer with 8 heads (4 of keys) of width 64 under a causal mask, one thread, ms of processor time,
fused and plain: in bfloat16 8 x 64 tokens 11.3 and 4.0; 8 x 128, 27 and 12; 4 x 256, 29 and 16; 2 x
512, 49 and 37; in float32 8 x 128, 14.7 and 14.3; 2 x 512, 51 and 42. Without a gradient the fused
kernel is the quicker one and stays, so evaluation and generation compute what they did.
"""

import torch
from torch import Tensor, nn
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import AttentionMaskInterface, sdpa_mask
from transformers.modeling_utils import AttentionInterface

NAME = "moe_ext_short"
"""What this attention is called among transformers' implementations."""

LONGEST = 512
"""Positions up to which the S x N weights are small enough to be kept for backward."""
BLOCK = 64
"""Queries taken at once: under a causal mask they need no key after their own last."""


def plain_attention(
    query_BHSC: Tensor, key_BKNC: Tensor, value_BKNC: Tensor, mask: Tensor, scaling: float
) -> Tensor:
    """(B, S, H, C): softmax in float32 over the keys that `mask` (bool, broadcast to B, 1, S, N)
    allows.

    A position that may see no key gets their mean, not NaN: padding must not spoil a batch.
    """
    length, num_keys = query_BHSC.shape[2], key_BKNC.shape[2]
    causal = length == num_keys and not mask.triu(1).any()
    out = []
    for first in range(0, length, BLOCK):
        rows = slice(first, first + BLOCK)
        seen = slice(0, first + BLOCK if causal else None)
        out.append(
            _some_queries(
                query_BHSC[:, :, rows],
                key_BKNC[:, :, seen],
                value_BKNC[:, :, seen],
                mask[..., rows, seen],
                scaling,
            )
        )
    return out[0] if len(out) == 1 else torch.cat(out, 1)


def _some_queries(
    query_BHSC: Tensor, key_BKNC: Tensor, value_BKNC: Tensor, mask: Tensor, scaling: float
) -> Tensor:
    batch, heads, length, width = query_BHSC.shape
    kv_heads = key_BKNC.shape[1]
    shared = (batch, kv_heads, heads // kv_heads, length, -1)
    rows = (query_BHSC * scaling).reshape(batch, kv_heads, -1, width)
    score = (rows @ key_BKNC.transpose(2, 3)).view(shared)
    score = score.masked_fill(~mask.unsqueeze(-3), torch.finfo(score.dtype).min)
    weight = score.softmax(-1, dtype=torch.float32).to(value_BKNC.dtype)
    out = weight.flatten(2, 3) @ value_BKNC
    return out.view(batch, heads, length, -1).transpose(1, 2).contiguous()


def attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    **kwargs,
) -> tuple[Tensor, None]:
    """transformers' attention interface: plain where that is quicker, else its own `sdpa`."""
    length, num_keys = query.shape[2], key.shape[2]
    causal = kwargs.get("is_causal")
    causal = getattr(module, "is_causal", True) if causal is None else causal
    plain = (
        query.requires_grad
        and query.device.type == "cpu"
        and num_keys <= LONGEST
        and dropout == 0.0
        and kwargs.get("position_bias") is None
        and kwargs.get("softcap") is None
        and (attention_mask is None or attention_mask.dtype == torch.bool)
        and (attention_mask is not None or (causal and length == num_keys))
    )
    if not plain:
        return sdpa_attention_forward(
            module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, **kwargs
        )
    if attention_mask is None:
        attention_mask = torch.ones(1, length, num_keys, dtype=torch.bool).tril()
    else:
        attention_mask = attention_mask[..., :num_keys]
    scaling = query.shape[-1] ** -0.5 if scaling is None else scaling
    return plain_attention(query, key, value, attention_mask, scaling), None


def use_short_attention(config) -> None:
    """Let a model whose attention is transformers' `sdpa` use this one; others keep theirs.

    So does one whose layers choose keys by an index of their own (DeepSeek-V3.2): they apply it only
    under transformers' own names, and would attend to every key under ours.
    """
    indexed = "indexed_attention" in (getattr(config, "layer_types", None) or ())
    if config._attn_implementation != "sdpa" or indexed:
        return
    AttentionInterface.register(NAME, attention)
    AttentionMaskInterface.register(NAME, sdpa_mask)
    config._attn_implementation = NAME
