"""The upcycled base: copies equal the dense model; specialised experts equal what a plain solver
finds."""

import json
import os

import pytest
import torch
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    LlamaConfig,
    MistralConfig,
    PreTrainedTokenizerFast,
    Qwen2Config,
)

from moe_ext.config import SpecialiseConfig
from moe_ext.model import specialise
from moe_ext.model.checkpoint_files import publish_folder, save_tensors
from moe_ext.model.files import Checkpoint
from moe_ext.model.upcycle import cached_upcycle, sparse_layers, upcycle

SHAPE = {
    "vocab_size": 60,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "eos_token_id": 1,
}
DENSE = {
    "llama": LlamaConfig(**SHAPE, tie_word_embeddings=True, head_dim=12),
    "llama3 rope": LlamaConfig(
        **SHAPE,
        rope_parameters={
            "rope_type": "llama3",
            "rope_theta": 1e4,
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 8,
        },
    ),
    "qwen2": Qwen2Config(**SHAPE, rms_norm_eps=1e-5),
    "mistral": MistralConfig(**SHAPE, sliding_window=5),
}


def save_dense(folder, config, seed=0) -> nn.Module:
    """A random dense model and a tokenizer of letters in `folder`; returns the model."""
    from tokenizers import Tokenizer, models, pre_tokenizers

    torch.manual_seed(seed)
    lm = AutoModelForCausalLM.from_config(config).eval()
    for name, parameter in lm.named_parameters():  # logits that tell; biases that are not zero
        if "norm" not in name:
            parameter.data.normal_(std=0.3)
    lm.save_pretrained(folder)
    letters = {chr(ord("0") + i): i for i in range(config.vocab_size)}
    tokenizer = Tokenizer(models.WordLevel(letters, unk_token="0"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="0", eos_token="1")
    fast.chat_template = "{{ messages[0]['content'] }}"
    fast.save_pretrained(folder)
    return lm


@pytest.mark.parametrize("name", DENSE)
@pytest.mark.parametrize("top_k", [1, 2])
def test_copies_equal_the_dense_model(tmp_path, name, top_k):
    dense = save_dense(tmp_path / "dense", DENSE[name])
    path = upcycle(tmp_path / "dense", tmp_path / "moe", num_experts=4, top_k=top_k, layers=[1, 3])
    moe = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()
    assert moe.config.model_type == "qwen2_moe"
    kinds = [type(layer.mlp).__name__ for layer in moe.model.layers]
    assert kinds == ["Qwen2MoeMLP", "Qwen2MoeSparseMoeBlock"] * 2
    ids = torch.randint(60, (2, 20))
    with torch.no_grad():
        expected, got = dense(ids).logits, moe(ids).logits
    assert expected.std() > 0.1
    assert (got - expected).abs().max() <= 1e-5 * expected.abs().max()
    tokenizer = AutoTokenizer.from_pretrained(path)
    assert tokenizer("3a")["input_ids"] == [3, ord("a") - ord("0")]
    assert tokenizer.chat_template == "{{ messages[0]['content'] }}"


def test_what_qwen2_moe_cannot_express_is_refused(tmp_path):
    save_dense(tmp_path / "biased", LlamaConfig(**SHAPE, mlp_bias=True))
    with pytest.raises(ValueError, match="mlp_bias"):
        upcycle(tmp_path / "biased", tmp_path / "moe")
    save_dense(tmp_path / "dense", DENSE["llama"])
    with pytest.raises(ValueError, match="base.top_k=5"):
        upcycle(tmp_path / "dense", tmp_path / "moe", num_experts=4, top_k=5)
    with pytest.raises(ValueError, match="base.specialise.expert_width=49"):
        upcycle(tmp_path / "dense", tmp_path / "moe", settings=SpecialiseConfig(expert_width=49))
    with pytest.raises(ValueError, match="the calibration texts have 3 tokens"):
        upcycle(
            tmp_path / "dense",
            tmp_path / "moe",
            settings=SpecialiseConfig(tokens=64, sequence_length=16),
            calibration_texts=["ab"],
        )
    with pytest.raises(ValueError, match="base.sparse_offset=9"):
        sparse_layers(4, 3, 9)
    assert sparse_layers(30, 3, 1) == [1, 4, 7, 10, 13, 16, 19, 22, 25, 28]
    assert sorted(os.listdir(tmp_path)) == ["biased", "dense"]  # nothing half-written


def brute_force_fit(x, mlp, layer: specialise.SpecialisedLayer, kept_EI, prior_EDI, top_k, ridge):
    """The experts' columns from one wide, mostly empty least-squares problem, in float64."""
    num_experts, width = kept_EI.shape
    logits = x @ layer.router_ED.T
    top = logits.topk(top_k, dim=1)
    a = mlp.act_fn(mlp.gate_proj(x)) * mlp.up_proj(x)
    wide = torch.zeros(len(x), num_experts, width, dtype=torch.float64)
    for t in range(len(x)):
        for e, w in zip(top.indices[t].tolist(), top.values[t].softmax(0).tolist(), strict=True):
            wide[t, e] = (w * a[t, kept_EI[e]]).double()
    wide = wide.flatten(1)
    prior = prior_EDI.transpose(1, 2).flatten(0, 1).double()
    gram = wide.T @ wide
    gram += ridge * gram.diagonal().mean() * torch.eye(len(gram), dtype=torch.float64)
    residual = mlp.down_proj(a).double() - wide @ prior
    columns = prior + torch.linalg.solve(gram, wide.T @ residual)
    return columns.view(num_experts, width, -1).transpose(1, 2), wide @ columns


@torch.no_grad()
@pytest.mark.parametrize("top_k", [1, 2, 3])
def test_fitted_columns_are_the_ridge_solution_of_the_whole_layer(top_k):
    torch.manual_seed(0)
    config = LlamaConfig(**SHAPE)
    mlp = AutoModelForCausalLM.from_config(config).model.layers[0].mlp
    for parameter in mlp.parameters():
        parameter.normal_(std=0.3)
    x = torch.randn(400, 32) + torch.randn(32)
    generator = torch.Generator().manual_seed(0)
    layer, output, report = specialise.fit_layer(x, mlp, 4, top_k, 24, generator)
    gate = mlp.gate_proj.weight
    kept_EI = torch.stack(
        [
            torch.tensor([int((gate == row).all(1).nonzero()) for row in layer.gate_EID[e]])
            for e in range(4)
        ]
    )
    assert all(len(set(row.tolist())) == 24 for row in kept_EI)
    prior_EDI = torch.stack([mlp.down_proj.weight[:, kept] for kept in kept_EI])
    columns, fitted = brute_force_fit(x, mlp, layer, kept_EI, prior_EDI, top_k, specialise.RIDGE)
    torch.testing.assert_close(layer.down_EDI.double(), columns, rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(output.double(), fitted, rtol=1e-3, atol=1e-4)
    assert report.error < 0.9 * report.pruned_error
    assert sum(report.load_E) == pytest.approx(1)
    assert max(report.load_E) < 0.4


@torch.no_grad()
def test_router_finds_clusters_and_balances():
    """Four well-separated clusters around a common mean: each expert gets one."""
    generator = torch.Generator().manual_seed(0)
    centre = 4 * torch.linalg.qr(torch.randn(32, 4, generator=generator)).Q.T
    label = torch.arange(400) % 4
    x = centre[label] + 0.3 * torch.randn(400, 32, generator=generator) + 1.5
    rows = specialise.router_rows(x, 4, 2, generator)
    first = (x @ rows.T).argmax(1)
    assert {tuple(first[label == k].unique().tolist()) for k in range(4)} == {
        (0,), (1,), (2,), (3,),
    }  # fmt: skip
    weight = (x @ rows.T).topk(2, dim=1).values.softmax(1)[:, 0].mean()
    assert weight == pytest.approx(specialise.FIRST_WEIGHT, abs=0.01)


def test_specialised_checkpoint_computes_what_was_fitted(tmp_path):
    """The written folder, read by Hugging Face, gives the hidden states that the fit carried on."""
    save_dense(tmp_path / "dense", DENSE["llama"])
    texts = ["".join(chr(ord("2") + (i * i * k) % 50) for i in range(200)) for k in range(1, 12)]
    settings = SpecialiseConfig(tokens=1024, sequence_length=32, expert_width=24)
    reports = []
    path = upcycle(
        tmp_path / "dense", tmp_path / "moe", 4, 2, [1, 3], settings, texts, reports.append
    )
    assert [report.layer for report in reports] == [1, 3]
    lm = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()
    dense = AutoModelForCausalLM.from_pretrained(tmp_path / "dense", dtype=torch.float32).eval()
    assert lm.config.moe_intermediate_size == 24
    tokens = specialise.calibration_tokens(AutoTokenizer.from_pretrained(path), texts, settings)
    with torch.no_grad():
        ours = lm(tokens, output_hidden_states=True).hidden_states
        theirs = dense(tokens, output_hidden_states=True).hidden_states
    error = [(a - b).norm() / b.norm() for a, b in zip(ours, theirs, strict=True)]
    assert error[1] < 1e-5  # layer 0 is dense
    assert 1e-4 < error[2] < reports[0].error  # layer 1: smaller beside the residual stream
    record = json.loads((path / "upcycle.json").read_text())
    assert record["sparse_layers"] == [1, 3]


def test_cache_is_keyed_by_what_matters(tmp_path):
    save_dense(tmp_path / "dense", DENSE["llama"])
    text = ["".join(chr(ord("2") + i % 50) for i in range(400))]
    settings = SpecialiseConfig(tokens=64, sequence_length=16, expert_width=24)

    def build(num_experts=2, settings=settings, texts=text):
        arguments = (tmp_path / "dense", tmp_path, num_experts, 1, [1], settings, texts)
        return cached_upcycle(*arguments)

    first = build()
    stamp = (first / "model.safetensors").stat().st_mtime_ns
    assert build() == first
    assert (first / "model.safetensors").stat().st_mtime_ns == stamp
    others = [
        build(num_experts=3),
        build(settings=None),
        build(settings=SpecialiseConfig(tokens=80, sequence_length=16, expert_width=24)),
        build(texts=[*text, "more"]),
    ]
    assert len({first, *others}) == 5


def test_checkpoint_files_split_and_come_back(tmp_path):
    tensors = {f"t{i}": torch.randn(10, 10).bfloat16() for i in range(5)}
    publish_folder(
        tmp_path / "many", lambda folder: save_tensors(folder, tensors.items(), max_file_bytes=500)
    )
    assert len(list((tmp_path / "many").glob("model-*-of-00003.safetensors"))) == 3
    files = Checkpoint(tmp_path / "many")
    assert list(files) == sorted(tensors)
    assert all(torch.equal(files.tensor(key), value) for key, value in tensors.items())


def test_a_build_that_fails_leaves_nothing(tmp_path):
    def write(folder):
        (folder / "half").write_text("half")
        raise RuntimeError("stopped")

    with pytest.raises(RuntimeError, match="stopped"):
        publish_folder(tmp_path / "target", write)
    assert os.listdir(tmp_path) == []
