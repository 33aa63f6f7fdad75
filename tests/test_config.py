"""The configuration refuses typos, wrong types and impossible combinations in one line."""

import importlib.util
import json
from dataclasses import asdict

import pytest
from omegaconf import OmegaConf

from moe_ext.compose import CONF_DIR, ConfigError, from_hydra, load, to_yaml
from moe_ext.config import Placement, Scope, Trainable, TrainConfig
from moe_ext.config_check import check_paths, check_world
from moe_ext.training.run import to_plain


def compose(*overrides: str) -> TrainConfig:
    return load(CONF_DIR, list(overrides))


@pytest.mark.parametrize(
    "experiment", sorted(p.stem for p in (CONF_DIR / "experiment").glob("*.yaml"))
)
def test_every_experiment_composes(experiment):
    assert compose(f"experiment={experiment}").chain


@pytest.mark.parametrize(
    "choice",
    [
        "encoder@encoder.image=clip encoder.image.path=/clip data.max_length=2048",
        "encoder@encoder.image=siglip encoder.image.path=/siglip data.max_length=2048",
        "base=folder base.path=/mixtral",
        "base=dense_folder base.dense=/llama",
        "data=shards data.streams.train.manifest=/manifest.json",
        "extension=moextend_joint",
        "connector=mlp_random",
        "parallel=expert",
        "cluster=h100x8",
        "cluster=h100x8_4nodes parallel.ep_size=8 parallel.hot_experts=2",
        "tracking=local",
        "tracking=tensorboard",
    ],
)
def test_every_group_choice_composes(choice):
    compose(*choice.split())


def test_values_arrive_typed():
    config = compose("experiment=demo", "parallel.ep_size=2", "extension.placement=shard")
    assert (config.name, config.run_dir) == ("demo", "runs/demo")
    assert (
        config.extension.scope is Scope.preserve and config.extension.placement is Placement.shard
    )
    assert config.stages["align"].train == [Trainable.connector]
    assert config.chain == ["align", "probe", "extend", "tune"]


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["experiment=demoo"], "did you mean demo?"),
        (["optim.clipnorm=1"], "optim.clipnorm is not a setting; did you mean optim.clip_norm?"),
        (["+optim.clipnorm=1"], "optim.clipnorm is not a setting; did you mean optim.clip_norm?"),
        (["+bogus=1"], "bogus is not a setting"),
        (["stages.tun.steps=3"], "stages.tun is not a setting"),
        (["tracking.alerts.loss_spike=0.9"], "tracking.alerts.loss_spike=0.9 is a multiple"),
        (["tracking.alerts.window=1"], "tracking.alerts.window=1 must be at least 2"),
        (["tracking.log_every=0"], "tracking.log_every=0 must be at least 1"),
        (
            ["optim.clip_norm=abc"],
            "optim.clip_norm: Value 'abc' of type 'str' could not be converted",
        ),
        (["stages.tune.steps=1.5"], "stages.tune.steps: Value '1.5'"),
        (["extension.scope=prserve"], r"expected one of \[joint, preserve, modality\]"),
        (["stages.tune.train=[connector,bogus]"], "Invalid value 'bogus'"),
        (["name=a/b"], "name='a/b'"),
        (["base=folder"], "give exactly one"),
        (["base.top_k=5"], "base.top_k=5"),
        (["base.frozen_bits=5"], "base.frozen_bits=5 must be 8 or 4, or 0"),
        (["base.frozen_format=nf4", "base.frozen_bits=8"], "nf4 is a format of 4 bits"),
        (["parallel.hot_experts=2"], "needs frozen experts that tokens travel to"),
        (["parallel.hot_experts=2", "+parallel.hot_lists={3:[1]}"], "name hot experts twice"),
        (["cluster.usable_share=2"], "cluster.usable_share=2.0 is a share"),
        (["cluster.nodes=0"], "cluster.nodes=0 must be at least 1"),
        (["parallel.zero_stage=3"], "zero_stage=3 is refused"),
        (["extension.expert_type=lora", "extension.expert_init=random"], "starts as its source"),
        (["extension.source_expert=-2"], "extension.source_expert"),
        (["extension.random_scale=0"], "random_scale=0.0 must be above 0"),
        (
            [
                "extension.row_init=clone_shared",
                "extension.num_new_experts=2",
                "extension.source_expert=1",
            ],
            "gives a source one clone",
        ),
        (
            ["extension.row_init=clone_shared", "extension.loss_free_rate=0.01"],
            "loss_free_rate=0.01 has nothing to move",
        ),
        (["parallel.zero_stage=0"], "zero_stage=0 with optim.clip_norm=1.0 is refused"),
        (["chain=[align,tune]"], "no stage of kind extend before tune"),
        (["chain=[align,extend,tune]"], "without a probe before it"),
        (["chain=[align,align]"], "names a stage twice"),
        (["chain=[align,other]"], "'other', which is not in stages"),
        (["chain=[extend,probe]", "extension.layers=[1]"], "probes after the surgery"),
        (["stages.extend.steps=2"], "trains nothing"),
        (["stages.align.train=[]"], "stages.align.train is empty"),
        (["stages.align.train=[router_delta]"], "only a stage of kind probe"),
        (
            ["extension.calibration=none"],
            "stages.tune.train holds calibration, but extension.calib",
        ),
        (
            ["parallel.zero_stage=0", "optim.clip_norm=0", "parallel.precision=bf16"],
            "zero_stage=0 with parallel.precision=bf16 is refused",
        ),
        (["stages.align.data=other"], "not a stream"),
        (["extension.placement=shard"], "needs parallel.ep_size > 1"),
        (["extension.layers=[1,1]"], "must be different"),
        (
            ["+extension.sources={1:[0]}", "extension.layers=[1]"],
            "extension.layers would name them",
        ),
        (
            ["+extension.sources={1:[0]}", "extension.num_new_experts=2"],
            "num_new_experts would name",
        ),
        (["+extension.sources={1:[]}"], "must give a decoder layer"),
        (["+extension.sources={1:[0,-2]}"], "must give a decoder layer"),
        (["+extension.sources={1:[0,0]}", "extension.row_init=clone_shared"], "a source one clone"),
        (["encoder.image.tokens_per_item=10"], "must be a square number"),
        (["data.max_length=12"], "leaves no room for text"),
        (["data.pack=true", "data.homogeneous_span=8"], "data.homogeneous_span=8 with data.pack"),
        (["data=shards"], "data.streams.train.manifest is missing"),
        (["optim.beta2=1"], "optim.beta2=1.0"),
        (["foo=="], "Error parsing override"),
    ],
)
def test_what_is_wrong_is_said_in_one_line(overrides, message):
    with pytest.raises(ConfigError, match=message) as caught:
        compose(*overrides)
    assert "\n" not in str(caught.value)


def test_a_layer_s_own_sources_need_no_probe(tmp_path):
    by_layer = ("+extension.sources={10:[3,-1],4:[0]}", "+parallel.hot_lists={4:[1]}")
    config = compose("chain=[extend,tune]", *by_layer, "parallel.ep_size=2")
    assert config.extension.sources == {10: [3, -1], 4: [0]}
    assert config.extension.named_layers == [4, 10]
    file = tmp_path / "config.json"
    file.write_text(json.dumps(to_plain(asdict(config))))  # as a run keeps it
    assert load(CONF_DIR, [], file) == config


def test_the_number_of_ranks_must_fit():
    config = compose("parallel.ep_size=2")
    check_world(config, world_size=4)
    with pytest.raises(ValueError, match="parallel.ep_size=2 does not divide the 3 rank"):
        check_world(config, world_size=3)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ("base=folder base.path=/none", "base.path=/none holds no config.json"),
        ("base=dense_folder base.dense=/none", "base.dense=/none holds no config.json"),
        ("encoder.image.path=/none", "encoder.image.path=/none does not exist"),
        ("data=shards data.streams.train.manifest=/none", "data.streams.train.manifest=/none"),
    ],
)
def test_what_is_not_there_is_named(overrides, message):
    with pytest.raises(ValueError, match=message):
        check_paths(compose(*overrides.split()))


def test_remote_shards_are_not_looked_for_here():
    check_paths(compose("data=shards", "data.streams.train.manifest=https://host/manifest.json"))


def test_a_resolved_file_reads_back_equal(tmp_path):
    config = compose("experiment=smoke", "extension.scope=joint", "seed=3")
    file = tmp_path / "resolved.yaml"
    file.write_text(to_yaml(config))
    assert load(CONF_DIR, [], file) == config
    assert from_hydra(OmegaConf.create(to_yaml(config))) == config
    assert load(CONF_DIR, ["seed=4"], file).seed == 4
    file.write_text(file.read_text().replace("clip_norm", "clipnorm"))
    with pytest.raises(ConfigError, match="did you mean optim.clip_norm"):
        load(CONF_DIR, [], file)


def test_tensorboard_without_its_package_is_refused_at_the_start(monkeypatch):
    config = compose("experiment=demo", "tracking=tensorboard")
    find = importlib.util.find_spec
    monkeypatch.setattr(
        "importlib.util.find_spec", lambda name: None if name == "tensorboard" else find(name)
    )
    with pytest.raises(ValueError, match=r"pip install 'moe_ext\[tensorboard\]'"):
        check_paths(config)
    check_paths(compose("experiment=demo", "tracking=wandb"))
