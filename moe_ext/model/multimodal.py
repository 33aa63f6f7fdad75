"""Encoders -> connectors -> placeholder tokens -> language model -> losses by name.

Shape letters: B sequences, S positions, D the language model's width, V its vocabulary,
Z target positions of the micro-batch.
"""

from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint, set_checkpoint_early_stop
from transformers import DynamicCache, PreTrainedModel

from moe_ext.batch import IGNORED_LABEL, Batch
from moe_ext.config import Scope
from moe_ext.model.context import RoutingContext
from moe_ext.model.dispatch import Liveness
from moe_ext.model.head import target_nll
from moe_ext.model.masks import decoder_mask
from moe_ext.model.moe import extended_layers


@dataclass
class Output:
    """One forward pass of one rank."""

    nll_Z: Tensor
    """fp32 with graph: negative log-likelihood of every target, in nats, in row-major order."""
    target_Z: Tensor
    """int64: flat position b * S + s of every target."""
    context: RoutingContext
    """The layers' records."""

    @property
    def nll_sum(self) -> Tensor:
        """() fp32 with graph; zero when there is no target."""
        return self.nll_Z.sum()


def attention_mask(batch: Batch) -> Tensor | None:
    """(B, 1, S, S) bool, causal inside every segment; None where plain causal attention is that.

    With right padding no real token sees a later one, so an unpacked batch needs no mask.
    """
    segment = batch.segment_ids
    if int(segment.max()) <= 1:
        return None
    same = segment.unsqueeze(1) == segment.unsqueeze(2)
    return same.tril().unsqueeze(1)


class MultimodalMoE(nn.Module):
    """A language model with extended layers, and one encoder and connector a modality.

    Args:
        lm: made by `load_base`; its extended layers share one holder of the routing context.
        encoders: modality id -> frozen encoder. Not submodules: an engine that casts or broadcasts
            the model leaves them alone.
        connectors: modality name -> connector, in the order of the modality ids 1, 2, ...
        activation_checkpointing: keep only the decoder layers' inputs and compute the rest again in
            backward. Routing is kept, never recomputed.
    """

    def __init__(
        self,
        lm: PreTrainedModel,
        encoders: dict[int, nn.Module],
        connectors: nn.ModuleDict,
        activation_checkpointing: bool = False,
    ):
        super().__init__()
        self.lm, self.connectors = lm, connectors
        (self.holder,) = {layer.holder for layer in extended_layers(lm).values()}
        self.encoders = dict(encoders)
        self.modality_of = {name: 1 + i for i, name in enumerate(connectors)}
        self.live_from: tuple[int, ...] | None = None
        """Modalities from whose first token on a token is live; None: every token is."""
        if activation_checkpointing:
            for layer in lm.model.layers:
                layer.forward = partial(
                    checkpoint, layer.forward, use_reentrant=False, context_fn=self._both_times
                )

    def _both_times(self) -> tuple[AbstractContextManager[None], AbstractContextManager[None]]:
        """Around a decoder layer in a pass that is under way, and where backward computes it again."""
        context = self.holder.context
        again = nullcontext() if context is None else self.holder.replaying(context)
        return nullcontext(), again

    def forward(
        self,
        batch: Batch,
        mask: Tensor | None = None,
        with_losses: bool = False,
        keeps_base_choice: bool = False,
    ) -> Output:
        """Losses of the batch's targets.

        Args:
            mask: (B, 1, S, S) bool in place of the batch's own attention mask.
            with_losses: record what the balance loss and the z-loss need.
            keeps_base_choice: record what the base alone would choose, of every token.
        """
        context = RoutingContext(
            batch.modality_ids,
            batch.segment_ids,
            with_losses=with_losses,
            keeps_base_choice=keeps_base_choice,
        )
        if mask is None and self.live_from is not None and torch.is_grad_enabled():
            live_T = context.allowed_T(Scope.preserve, self.live_from)
            if not (live_T | ~context.valid_T).all():
                context.live_T = live_T
        embedding_BSD = self.embed(batch)
        seen = attention_mask(batch) if mask is None else mask
        taken = decoder_mask(self.lm.config, seen, batch.position_ids, embedding_BSD.dtype)
        # no early stop: recomputation repeats a layer's collectives, all of them on every rank
        with self.holder.during(context), set_checkpoint_early_stop(False):
            hidden_BSD = self.lm.model(
                inputs_embeds=embedding_BSD,
                attention_mask=taken,
                position_ids=batch.position_ids,
                use_cache=False,
            ).last_hidden_state
        flat = batch.labels.reshape(-1)
        target_Z = (flat != IGNORED_LABEL).nonzero().squeeze(1)
        # only the targets' rows reach the vocabulary: a sliced (B, S, D) tensor is slow in bf16
        hidden_ZD = hidden_BSD.reshape(-1, hidden_BSD.shape[-1])[target_Z]
        nll_Z = target_nll(hidden_ZD, self.lm.lm_head, flat[target_Z], self.logits_divisor)
        return Output(nll_Z, target_Z, context)

    @property
    def logits_divisor(self) -> float:
        return getattr(self.lm.config, "logits_scaling", 1.0)

    def logits(self, hidden_D: Tensor) -> Tensor:
        """(..., V) in the model's dtype."""
        logits = self.lm.lm_head(hidden_D)
        return logits if self.logits_divisor == 1.0 else logits / self.logits_divisor

    def features(self, modality: int, media: Tensor) -> Tensor:
        """(M, P, F) of the frozen encoder; no rows, no call. `media` may be such features already."""
        encoder = self.encoders[modality]
        if media.shape[1:] == (encoder.tokens_per_item, encoder.feature_dim):
            weight = next(encoder.parameters(), media)
            return media.to(weight.dtype)  # from the cache (data.features)
        if media.shape[0] == 0:
            return media.new_zeros(0, encoder.tokens_per_item, encoder.feature_dim)
        with torch.no_grad():
            return encoder(media)

    def embed(self, batch: Batch) -> Tensor:
        """(B, S, D) input embeddings, the placeholders' written over by the connectors.

        A batch without a modality still runs that connector, on zero rows: every trainable tensor
        is in the graph of every rank.

        Raises:
            ValueError: placeholders and media items do not match, or there is no position at all.
        """
        if batch.input_ids.numel() == 0:
            raise ValueError(
                f"a batch of {' x '.join(map(str, batch.input_ids.shape))} positions: every rank's pass "
                "needs at least one sequence, or its peers wait for it in the exchange of tokens; give "
                "a rank that has none a row of padding (stages.*.sequences_per_rank is at least 1)"
            )
        embedding_BSD = self.lm.get_input_embeddings()(batch.input_ids)
        flat = embedding_BSD.reshape(-1, embedding_BSD.shape[-1])
        modality_flat = batch.modality_ids.reshape(-1)
        for name, modality in self.modality_of.items():
            media = batch.media.get(modality)
            if media is None:
                media = flat.new_zeros(0)
            token_MPD = self.connectors[name](self.features(modality, media))
            rows = token_MPD.reshape(-1, flat.shape[1]).to(flat.dtype)
            where = (modality_flat == modality).nonzero().squeeze(1)
            if where.numel() != rows.shape[0]:
                raise ValueError(
                    f"a batch has {where.numel()} placeholders of modality {name} but "
                    f"{media.shape[0]} items of {token_MPD.shape[1]} tokens each; "
                    f"encoder.{name}.tokens_per_item must be the same for data and model"
                )
            flat = flat.index_copy(0, where, rows)
        return flat.view_as(embedding_BSD)

    def set_liveness(self) -> None:
        """Tell every extended layer what a gradient flows to. Call after choosing what trains.

        It is read off which parameters train, the same on all ranks, and never off a rank's data.
        Tokens are another matter: one that stands before everything trainable, in all layers, has no
        gradient that would be of use, and an exchange in backward leaves it out (`live_from`).
        """
        below = any(p.requires_grad for p in self.connectors.parameters())
        below |= any(p.requires_grad for p in self.lm.get_input_embeddings().parameters())
        for layer in extended_layers(self.lm).values():
            router = any(p.requires_grad for p in layer.router.parameters())
            travels = any(p.requires_grad for bank in layer.travelling for p in bank.parameters())
            weight = below or router
            layer.liveness = Liveness(input=below, weight=weight, output=weight or travels)
            below |= router or any(p.requires_grad for p in layer.parameters())
        self.live_from = self._live_from()

    def _live_from(self) -> tuple[int, ...] | None:
        """Connectors reach a token from their modality's first one on, and so do new experts whose
        scope looks back; whatever else trains may reach every token."""
        modalities, known = set(), set()
        for name, connector in self.connectors.items():
            if any(p.requires_grad for p in connector.parameters()):
                modalities.add(self.modality_of[name])
        for layer in extended_layers(self.lm).values():
            for name, rows in layer.router.rows.items():
                own = [*rows.parameters(), *layer.new[name].parameters()]
                if rows.scope is not Scope.joint:
                    known |= set(own)
                    modalities |= (
                        set(rows.modalities) if any(p.requires_grad for p in own) else set()
                    )
        anywhere = any(p.requires_grad and p not in known for p in self.lm.parameters())
        return None if anywhere else tuple(sorted(modalities))

    @torch.no_grad()
    def generate(self, batch: Batch, max_new_tokens: int, stop_ids: set[int]) -> list[list[int]]:
        """Greedy continuation of every row's prompt, without the stop id.

        A collective under expert parallelism: every rank makes exactly `max_new_tokens` passes,
        with finished rows as padding, so ranks call it equally often with equal `max_new_tokens`.
        """
        left = _left_padded(batch)
        valid_BS = left.segment_ids != 0
        cache = DynamicCache(config=self.lm.config)
        context = RoutingContext(left.modality_ids, left.segment_ids)
        seen_B = {
            m: (left.modality_ids == m).any(1) for m in self.modality_of.values()
        }  # fmt: skip
        inputs = {"inputs_embeds": self.embed(left), "position_ids": left.position_ids}
        next_position_B = left.position_ids[:, -1:] + 1
        done_B = torch.zeros_like(valid_BS[:, 0])
        written: list[list[int]] = [[] for _ in range(batch.input_ids.shape[0])]
        stops = torch.tensor(sorted(stop_ids), device=done_B.device)
        for _ in range(max_new_tokens):
            with self.holder.during(context):
                hidden_BSD = self.lm.model(
                    attention_mask=valid_BS.long(), past_key_values=cache, use_cache=True, **inputs
                ).last_hidden_state
            token_B = self.logits(hidden_BSD[:, -1]).argmax(-1)
            done_B = done_B | torch.isin(token_B, stops)
            for row, (token, done) in enumerate(
                zip(token_B.tolist(), done_B.tolist(), strict=True)
            ):
                if not done:
                    written[row].append(token)
            step_B1 = (~done_B).long().unsqueeze(1)
            context = RoutingContext(torch.zeros_like(step_B1), step_B1, seen_B=seen_B)
            embedding = self.lm.get_input_embeddings()(token_B.unsqueeze(1))
            inputs = {"inputs_embeds": embedding, "position_ids": next_position_B}
            next_position_B = next_position_B + 1
            valid_BS = torch.cat([valid_BS, torch.ones_like(valid_BS[:, :1])], 1)
        return written


def _left_padded(batch: Batch) -> Batch:
    """The batch with every row's padding moved to its front, as continuing a row needs."""
    length = batch.segment_ids.shape[1]
    shift_B1 = (batch.segment_ids == 0).sum(1, keepdim=True)
    source_BS = (torch.arange(length, device=shift_B1.device) - shift_B1) % length

    def move(tensor: Tensor) -> Tensor:
        return tensor.gather(1, source_BS)

    return Batch(
        input_ids=move(batch.input_ids),
        labels=move(batch.labels),
        modality_ids=move(batch.modality_ids),
        segment_ids=move(batch.segment_ids),
        position_ids=move(batch.position_ids),
        media=batch.media,
        sample_keys=batch.sample_keys,
    )
