"""The extended layer: route, dispatch, experts, combine.

A frozen bank (pretrained experts) and any number of new banks (one an extension) behind one router.
It takes the place of a Hugging Face sparse block: hidden states in, hidden states out.

Shape letters: B sequences, S positions, T = B * S tokens, D hidden width, E frozen experts.
"""

import torch
from torch import Tensor, nn
from torch.distributed import ProcessGroup

from moe_ext.config import Placement
from moe_ext.model.context import ContextHolder, text_context
from moe_ext.model.dispatch import Liveness, give_back, plan_route, send
from moe_ext.model.experts import Bank, FrozenBank
from moe_ext.model.placement import owners
from moe_ext.model.routing import Router
from moe_ext.model.row_plan import NO_EXPERT, RowPlan, plan_rows
from moe_ext.model.rows import NewRows


class ExtendedMoE(nn.Module):
    """One sparse block with frozen and new experts.

    Args:
        shared: the block's shared experts, (T, D) -> (T, D), added to the routed output; or None.
        ep_group: the expert-parallel group; None is the same mathematics on one rank.
        holder: where the routing context is found, one object for all layers of a model.
        returns_tuple: the family's decoder layer expects `(hidden, router scores)` (GPT-OSS).
        hot: frozen experts that every rank of the group holds; `frozen` has the others.
    """

    def __init__(
        self,
        layer_index: int,
        router: Router,
        frozen: FrozenBank,
        shared: nn.Module | None,
        holder: ContextHolder,
        ep_group: ProcessGroup | None = None,
        returns_tuple: bool = False,
        hot: FrozenBank | None = None,
    ):
        super().__init__()
        self.layer_index, self.router, self.frozen, self.shared = (
            layer_index,
            router,
            frozen,
            shared,
        )
        self.hot, self.new = hot, nn.ModuleDict()
        self.holder, self.ep_group, self.returns_tuple = holder, ep_group, returns_tuple
        self.liveness = Liveness()
        self.physical_of: Tensor | None = None
        self._place()

    @property
    def num_frozen(self) -> int:
        return self.router.num_frozen

    @property
    def num_new(self) -> int:
        return sum(bank.num_experts for bank in self.new.values())  # type: ignore[misc]

    def experts_of(self, name: str) -> range:
        """Logical ids of the experts that an extension has here; none where it has none."""
        first = self.num_frozen
        for extension, bank in self.new.items():
            own = range(first, first + bank.num_experts)  # type: ignore[operator]
            if extension == name:
                return own
            first = own.stop
        return range(first, first)

    @property
    def frozen_banks(self) -> list[FrozenBank]:
        """The pretrained experts, those that every rank holds beside their sharded bank last."""
        return [self.frozen] if self.hot is None else [self.frozen, self.hot]

    @property
    def banks(self) -> list[Bank]:
        """The frozen banks, then the new ones in the order of their logical ids."""
        return [*self.frozen_banks, *self.new.values()]  # type: ignore[list-item]

    @property
    def travelling(self) -> list[Bank]:
        """The banks whose experts are spread over the group: tokens travel to them."""
        alone = self.ep_group is None or self.ep_group.size() == 1
        return [b for b in self.banks if not alone and b.placement is Placement.shard]

    def add_bank(self, name: str, bank: Bank, rows: NewRows) -> None:
        """Append an extension's experts; their logical ids follow all present ones.

        Raises:
            ValueError: the layer has an extension of that name already.
        """
        if name in self.new:
            raise ValueError(
                f"extension.name={name} is already present in layer {self.layer_index}; "
                "choose another name or remove it first"
            )
        self.new[name], self.router.rows[name] = bank, rows
        self._place()

    def remove_bank(self, name: str) -> None:
        """Take an extension out; with none left the layer is the base's, bit by bit."""
        del self.new[name], self.router.rows[name]
        self._place()

    def _place(self) -> None:
        """Where every expert lives: an owner a physical id, a first held id a bank.

        Physical ids are the logical ones, but for hot frozen experts, which come after the others: what
        a rank holds of a bank is one run of physical ids. A replicated expert's owner is NO_EXPERT: it
        is computed where its tokens are and never travels.
        """
        world = 1 if self.ep_group is None else self.ep_group.size()
        hot = [] if self.hot is None else self.hot.expert_ids
        order = [e for e in range(self.num_frozen) if e not in hot] + hot
        owner: list[int] = []
        for bank in self.banks:
            first = bank.expert_ids[0] if bank.expert_ids else 0
            is_frozen = isinstance(bank, FrozenBank)
            bank.first_held = order.index(first) if is_frozen else len(owner) + first
            if bank.placement is Placement.replicate or world == 1:
                owner += [NO_EXPERT] * bank.num_experts
            else:
                held = owners(bank.num_experts, world, bank.placement)
                owner += [rank for rank in range(world) for _ in held[rank]]
        physical = sorted(range(len(order)), key=order.__getitem__)
        physical += range(len(order), len(owner))
        self.physical_of = torch.tensor(physical) if hot else None
        self.owner_of = torch.tensor(owner, dtype=torch.int64)

    def forward(self, hidden_BSD: Tensor) -> Tensor | tuple[Tensor, Tensor | None]:
        batch, length, dim = hidden_BSD.shape
        x_TD = hidden_BSD.reshape(-1, dim)
        context = self.holder.context
        if context is None:
            context = text_context(batch, length, x_TD.device)
        routing = self.router(x_TD, context, self.layer_index)
        y_TD = self._experts(x_TD, routing.expert_TS, routing.weight_TS, context.live_T)
        y_BSD = y_TD.view(batch, length, dim)
        return (y_BSD, None) if self.returns_tuple else y_BSD

    def _experts(
        self, x_TD: Tensor, expert_TS: Tensor, weight_TS: Tensor, live_T: Tensor | None = None
    ) -> Tensor:
        """(T, D): sharded experts through the exchange, all others where their tokens are.

        The shared experts are computed while tokens travel, replicated ones while results do; in
        backward likewise, while the gradients of these do.
        """
        travel = self.travelling
        stay = [bank for bank in self.banks if bank not in travel]
        if self.physical_of is not None:
            self.physical_of = self.physical_of.to(x_TD.device)
            physical_TS = self.physical_of[expert_TS.clamp(min=0)]
            expert_TS = physical_TS.masked_fill(expert_TS < 0, NO_EXPERT)
        if not travel:
            y_TD = _sum_banks(x_TD, expert_TS, weight_TS, stay, live_T)
            return y_TD if self.shared is None else y_TD + self.shared(x_TD)
        self.owner_of = self.owner_of.to(x_TD.device)
        owner_TS = self.owner_of[expert_TS.clamp(min=0)]
        owner_TS = owner_TS.masked_fill(expert_TS < 0, NO_EXPERT)
        route = plan_route(expert_TS, owner_TS, self.ep_group, live_T)
        arriving = send(x_TD, expert_TS, weight_TS, owner_TS, route, self.liveness)
        shared_TD = None if self.shared is None else self.shared(x_TD)
        x_QD, expert_QS, weight_QS = arriving.wait()
        y_QD = _sum_banks(x_QD, expert_QS, weight_QS, travel, route.live_Q)
        returning = give_back(y_QD, route, self.liveness)
        plans = _plans(expert_TS, stay, live_T)
        stayed = [
            bank(x_TD, weight_TS, plan, some=True) for bank, plan in zip(stay, plans, strict=True)
        ]
        y_TD = returning.wait()
        for plan, rows_UD in zip(plans, stayed, strict=True):
            y_TD.index_add_(0, plan.token_U, rows_UD)
        return y_TD if shared_TD is None else y_TD + shared_TD


def _plans(expert_TS: Tensor, banks: list[Bank], live_T: Tensor | None) -> list[RowPlan]:
    runs = [(bank.first_held, len(bank.expert_ids)) for bank in banks]
    return plan_rows(expert_TS, runs, live_T) if banks else []


def _sum_banks(
    x_TD: Tensor, expert_TS: Tensor, weight_TS: Tensor, banks: list[Bank], live_T: Tensor | None
) -> Tensor:
    """(T, D): the sum of the banks' outputs.

    A bank after the first is added only to the tokens that chose it: no work for the others, and a
    token without a new expert keeps its bits. A bank nobody chose computes zero rows and stays in
    the graph.
    """
    plans = _plans(expert_TS, banks, live_T)
    y_TD = banks[0](x_TD, weight_TS, plans[0])
    for bank, plan in zip(banks[1:], plans[1:], strict=True):
        y_TD.index_add_(0, plan.token_U, bank(x_TD, weight_TS, plan, some=True))
    return y_TD


def extended_layers(lm: nn.Module) -> dict[int, ExtendedMoE]:
    """Decoder layer index -> its extended block, from the first layer to the last."""
    found = {m.layer_index: m for m in lm.modules() if isinstance(m, ExtendedMoE)}
    return dict(sorted(found.items()))
