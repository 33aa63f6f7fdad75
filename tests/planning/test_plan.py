"""The command and `parallel=auto`: what is chosen, that it is always the same, and what is refused."""

import json

import pytest
from omegaconf import OmegaConf
from transformers import AutoConfig

from moe_ext.compose import CONF_DIR, ConfigError, compose_only, from_hydra, load, to_yaml
from moe_ext.config import Placement
from moe_ext.config_check import check_world
from moe_ext.jobs.runs import run_id
from moe_ext.plan import plan_of
from moe_ext.plan_command import main
from moe_ext.planning.candidates import make_plan, subject_of
from tests.model.tiny import tiny_config
from tests.planning.known import MIXTRAL_8X7B, QWEN3_30B


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> str:
    """A folder with a configuration and nothing else."""
    folder = tmp_path_factory.mktemp("base")
    tiny_config("mixtral", hidden_size=64, intermediate_size=256).save_pretrained(folder)
    return str(folder)


def overrides(base: str, *more: str) -> list[str]:
    return ["base=folder", f"base.path={base}", "data.builtin=openmoji", *more]


def planned(model_type: str, dimensions: dict, *more: str):
    words = overrides("/nowhere", "parallel.activation_checkpointing=true", "data.max_length=2048",
                      "stages.tune.sequences_per_rank=2", *more)  # fmt: skip
    config = compose_only(CONF_DIR, words)
    subject = subject_of(config, AutoConfig.for_model(model_type, **dimensions))
    return make_plan(subject, config.cluster, (0, 8))


def test_the_command_prints_and_writes(base, tmp_path, capsys):
    assert main([*overrides(base), "--json", str(tmp_path / "plan.json"), "--all"]) == 0
    out = capsys.readouterr().out
    assert out.count("* ep ") == 1
    assert "mixtral: " in out
    found = json.loads((tmp_path / "plan.json").read_text())
    assert main([*overrides(base), "--json", "-"]) == 0
    assert json.loads(capsys.readouterr().out) == found  # the same every time
    best = found["candidates"][found["best"]]
    assert best["fits"]
    assert best["frozen_bits"] == 0
    kinds = best["memory_bytes"]
    parts = ("frozen", "rest", "encoder", "trained", "gradients", "optimizer")
    assert kinds["state"] == sum(kinds[part] for part in parts)
    assert len(found["candidates"]) == 24  # ep 1, and 3 of ep 2; ZeRO 1 and 2; plain, 8, 4 bits


def test_what_cannot_be_planned_is_said(base, tmp_path, capsys):
    assert main(overrides("/none")) == 2
    assert "base.path=/none has no config.json" in capsys.readouterr().err
    assert main([*overrides(base), "--new-share", "2"]) == 2
    assert "--new-share=2" in capsys.readouterr().err
    assert main([*overrides(base), "cluster.memory_gib=0.0001"]) == 1
    assert "nothing fits: the smallest" in capsys.readouterr().out
    assert main([*overrides(base), "cluster.memory_gib=0"]) == 2
    assert "cluster.memory_gib=0.0 must be above 0" in capsys.readouterr().err
    tiny_config("mixtral").save_pretrained(tmp_path)
    text = (tmp_path / "config.json").read_text().replace('"mixtral"', '"llama"')
    (tmp_path / "config.json").write_text(text)
    assert main(overrides(str(tmp_path))) == 2
    assert "has no row in FAMILIES" in capsys.readouterr().err


def test_auto_is_written_into_the_resolved_configuration(base, tmp_path):
    words = overrides(base, "parallel=auto", "experiment=smoke")
    config = load(CONF_DIR, words)
    parallel = config.parallel
    assert not parallel.auto
    best = plan_of(compose_only(CONF_DIR, words), exact=True).best
    assert best is not None
    chosen = (parallel.ep_size, parallel.zero_stage, parallel.frozen_placement)
    assert chosen == (best.placed.ep_size, best.placed.zero_stage, best.placed.frozen)
    assert config.extension.placement is best.placed.new
    assert parallel.planned.startswith(f"ep {parallel.ep_size}")
    assert (
        from_hydra(OmegaConf.create(to_yaml(config))) == config
    )  # read back, it is not planned again
    assert load(CONF_DIR, words) == config
    check_world(config, 2)
    with pytest.raises(ValueError, match="planned for the 2 ranks of cluster=cpu2, this job has 4"):
        check_world(config, 4)
    same = load(CONF_DIR, [*words, "cluster.achieved_share=0.3"])
    assert same.parallel.planned != parallel.planned
    assert run_id(same) == run_id(config)  # how fast it is believed to be decides no result


def test_auto_spreads_what_does_not_fit_otherwise(base):
    words = overrides(base, "parallel=auto")
    needs = plan_of(compose_only(CONF_DIR, words), exact=True)
    alone = min(c.memory.total for c in needs.candidates if c.placed.ep_size == 1)
    spread = min(c.memory.total for c in needs.candidates if c.placed.ep_size == 2)
    assert spread < alone
    between = (spread + alone) / 2 / 2**30 / 0.9
    config = load(CONF_DIR, [*words, f"cluster.memory_gib={between}"])
    assert config.parallel.ep_size == 2
    assert config.parallel.frozen_placement is Placement.shard
    with pytest.raises(ConfigError, match="parallel=auto for cluster=cpu2: nothing fits") as caught:
        load(CONF_DIR, [*words, f"cluster.memory_gib={spread / 2 / 2**30}"])
    assert "\n" not in str(caught.value)


def test_fine_grained_experts_do_not_cross_nodes():
    """Qwen3-30B does not fit an H100 beside its activations thrice: it is spread inside a node."""
    result = planned("qwen3_moe", QWEN3_30B, "cluster=h100x8_4nodes", "cluster.memory_gib=60")
    best = result.best
    assert best is not None
    assert 1 < best.placed.ep_size <= 8
    shard = Placement.shard
    across = [c for c in result.candidates if c.placed.ep_size == 32 and c.placed.frozen is shard]
    assert across
    assert all(c.time.total > 2 * best.time.total for c in across)


def test_a_base_in_8_bits_comes_after_every_exact_one_that_fits():
    result = planned("mixtral", MIXTRAL_8X7B, "cluster=h100x8")
    fitting = [c.placed.frozen_bits for c in result.candidates if c.fits]
    assert fitting == sorted(fitting)
    assert {0, 8} == set(fitting)
    one = planned("mixtral", MIXTRAL_8X7B, "cluster=h100x8", "cluster.ranks_per_node=1",
                  "extension.layers=[31]")  # fmt: skip
    assert one.best is not None
    assert one.best.placed.frozen_bits == 8  # 93 GB of bf16 do not fit one GPU


def test_more_ranks_and_hot_experts_move_the_figures_as_they_must():
    few = planned("mixtral", MIXTRAL_8X7B, "cluster=h100x8", "cluster.ranks_per_node=2")
    many = planned("mixtral", MIXTRAL_8X7B, "cluster=h100x8")

    def of(result, ep_size):
        return next(
            c for c in result.candidates
            if c.placed.ep_size == ep_size and c.placed.new is Placement.replicate
            and c.placed.zero_stage == 1 and not c.placed.frozen_bits
        )  # fmt: skip

    assert of(many, 2).memory.optimizer == pytest.approx(of(few, 2).memory.optimizer / 4, rel=1e-6)
    assert of(many, 8).memory.frozen == of(many, 2).memory.frozen / 4
    assert of(many, 8).wire_bytes > of(many, 2).wire_bytes
    subject, cluster = many.subject, many.cluster
    hot = make_plan(subject, cluster, (0,), (2,) * 32)
    assert of(hot, 8).wire_bytes < of(many, 8).wire_bytes
    assert of(hot, 8).memory.frozen > of(many, 8).memory.frozen
