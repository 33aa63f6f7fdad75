"""First weights of new experts and first rows of their router (see `ExpertInit`, `RowInit`)."""

import torch
from torch import Tensor, nn

from moe_ext.config import ExpertInit, ExtensionConfig, RowInit
from moe_ext.model.layouts import ExpertTensors
from moe_ext.model.routing import Router
from moe_ext.model.rows import NewRows


def start_expert(
    source: ExpertTensors, settings: ExtensionConfig, stream: torch.Generator
) -> ExpertTensors:
    """A new expert's first weights from its source's, fp32 or as stored."""
    if settings.expert_init is ExpertInit.copy:
        return source
    drop = settings.expert_init is ExpertInit.drop_upcycle
    wide = source.gate.shape[0]
    # Drop-Upcycling (arXiv 2502.19261): the same neurons of all three matrices are drawn anew, each
    # from the mean and deviation of the source's own matrix. `random` draws all, small, around zero.
    count = round(settings.drop_ratio * wide) if drop else wide
    scale = 1.0 if drop else settings.random_scale
    neurons = torch.randperm(wide, generator=stream)[:count]

    def drawn(value: Tensor, dim: int) -> Tensor:
        value = value.float().clone()
        mean = value.mean() if drop else 0.0
        size = list(value.shape)
        size[dim] = count
        noise = torch.randn(size, generator=stream) * scale * value.std() + mean
        return value.index_copy_(dim, neurons, noise.to(value.device))

    def zeroed(bias: Tensor | None) -> Tensor | None:
        return None if bias is None else bias.float().index_fill(0, neurons, 0.0)

    return ExpertTensors(
        drawn(source.gate, 0),
        drawn(source.up, 0),
        drawn(source.down, 1),
        zeroed(source.gate_bias),
        zeroed(source.up_bias),
        source.down_bias if drop or source.down_bias is None else source.down_bias.float() * 0.0,
    )


def start_rows(
    rows: NewRows,
    router: Router,
    sources: list[int],
    bias: list[float],
    init: RowInit,
    domain: Tensor | None,
) -> None:
    """First router rows and biases, one a new expert (see `RowInit`)."""
    frozen, frozen_bias = router.frozen_weight.float(), router.frozen_bias
    own_bias = torch.tensor(bias or [0.0] * len(sources), device=frozen.device)
    if init in (RowInit.clone, RowInit.clone_shared):
        rows.weight.copy_(frozen[sources])
        own_bias = own_bias if frozen_bias is None else own_bias + frozen_bias[sources].float()
    elif init is RowInit.mean:
        rows.weight.copy_(frozen.mean(0).expand_as(rows.weight))
        own_bias = own_bias if frozen_bias is None else own_bias + frozen_bias.float().mean()
    elif init is RowInit.domain:
        # FlexOlmo's domain embedding; brought to the frozen rows' mean length, so that its logits
        # are of the same size as theirs
        assert domain is not None
        direction = nn.functional.normalize(domain.float().to(frozen.device), dim=0)
        rows.weight.copy_((frozen.norm(dim=1).mean() * direction).expand_as(rows.weight))
    rows.bias.copy_(own_bias)
