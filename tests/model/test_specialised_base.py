"""The requirement on the real base: nearly the dense model's loss, and a routing that means
something."""

import functools
import operator

import pytest
import torch
import torch.nn.functional as F
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.models.qwen2_moe.modeling_qwen2_moe import Qwen2MoeTopKRouter

from moe_ext.config import BaseConfig
from moe_ext.data.texts import python_docs
from moe_ext.model.gguf import builtin_dense
from moe_ext.upcycle import prepare_base

SEQUENCE_LENGTH, SEQUENCES = 512, 12


@torch.no_grad()
def mean_loss(lm, tokens_BS: torch.Tensor) -> float:
    """Nats a token."""
    total = 0.0
    for row in tokens_BS:
        logits = lm(row[None, :-1]).logits[0].float()
        total += float(F.cross_entropy(logits, row[1:], reduction="sum"))
    return total / tokens_BS[:, 1:].numel()


def choose_at_random(router: Qwen2MoeTopKRouter, inputs, output):
    """Forward hook: the router's weights, given to experts drawn evenly without replacement."""
    logits, weights, chosen = output
    return logits, weights, torch.rand(logits.shape).argsort(1)[:, : chosen.shape[1]]


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_specialised_base_keeps_the_loss_and_needs_its_router(tmp_path):
    dense = builtin_dense("smollm2", tmp_path)
    path = prepare_base(BaseConfig(dense="builtin:smollm2"), tmp_path)
    tokenizer = AutoTokenizer.from_pretrained(dense)
    ids = functools.reduce(
        operator.iadd, (tokenizer(t)["input_ids"] for t in python_docs("heldout", "topics")), []
    )
    tokens = torch.tensor(ids[: SEQUENCES * SEQUENCE_LENGTH]).view(SEQUENCES, SEQUENCE_LENGTH)
    loss = {}
    for name, folder in (("dense", dense), ("moe", path)):
        lm = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16).eval()
        loss[name] = mean_loss(lm, tokens)
    routers = [m for m in lm.modules() if isinstance(m, Qwen2MoeTopKRouter)]
    assert len(routers) >= lm.config.num_hidden_layers / 3
    assert lm.config.num_experts >= 4
    assert lm.config.num_experts_per_tok == 2
    torch.manual_seed(0)
    for router in routers:
        router.register_forward_hook(choose_at_random)
    loss["random"] = mean_loss(lm, tokens)
    print(loss)
    assert loss["moe"] <= 1.03 * loss["dense"]
    assert loss["random"] >= loss["moe"] + 0.05
