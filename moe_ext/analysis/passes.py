"""Forward passes that need more than the model's own loss gives: hidden states of every position."""

from typing import cast

from torch import Tensor

from moe_ext.batch import Batch
from moe_ext.model.context import ContextHolder, RoutingContext
from moe_ext.model.multimodal import MultimodalMoE, attention_mask


def hidden_states(model: MultimodalMoE, batch: Batch, mask: Tensor | None = None) -> Tensor:
    """(B, S, D) last hidden states, ready for `model.logits`.

    `mask` is (B, 1, S, S) bool, in place of the batch's own attention mask.
    """
    holder = cast(ContextHolder, model.lm.context_holder)
    holder.context = RoutingContext(batch.modality_ids, batch.segment_ids)
    return model.lm.model(
        inputs_embeds=model.embed(batch),
        attention_mask=attention_mask(batch) if mask is None else mask,
        position_ids=batch.position_ids,
        use_cache=False,
    ).last_hidden_state
