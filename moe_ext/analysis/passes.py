"""Forward passes that need more than the model's own loss gives: hidden states of every position."""

from torch import Tensor

from moe_ext.batch import Batch
from moe_ext.model.context import RoutingContext
from moe_ext.model.masks import decoder_mask
from moe_ext.model.multimodal import MultimodalMoE, attention_mask


def hidden_states(model: MultimodalMoE, batch: Batch, mask: Tensor | None = None) -> Tensor:
    """(B, S, D) last hidden states, ready for `model.logits`.

    `mask` is (B, 1, S, S) bool, in place of the batch's own attention mask.
    """
    embedding_BSD = model.embed(batch)
    seen = attention_mask(batch) if mask is None else mask
    taken = decoder_mask(model.lm.config, seen, batch.position_ids, embedding_BSD.dtype)
    with model.holder.during(RoutingContext(batch.modality_ids, batch.segment_ids)):
        return model.lm.model(
            inputs_embeds=embedding_BSD,
            attention_mask=taken,
            position_ids=batch.position_ids,
            use_cache=False,
        ).last_hidden_state
