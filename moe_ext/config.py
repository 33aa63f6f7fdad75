"""Every setting of a run and its meaning; those of launcher and cluster have files of their own.

A command composes YAML with Hydra and turns the result into these dataclasses once (`compose.py`);
deeper code gets numbers. A wrong type or an unknown key is refused by them as the schema, an impossible
combination by `config_check.py`, each before a process group exists and in one line that names the key.
"""

from dataclasses import dataclass, field
from enum import Enum

from omegaconf import MISSING

from moe_ext.config_cluster import ClusterConfig
from moe_ext.config_launcher import LauncherConfig


class Scope(Enum):
    """Which tokens may choose new experts."""

    joint = "joint"
    """Every token (MoExtend, section 2.4)."""
    preserve = "preserve"
    """Tokens from the first token of the new modality on; a text-only sequence is the base."""
    modality = "modality"
    """Tokens of the new modality only."""


class Placement(Enum):
    """Where the experts of a bank live inside an expert-parallel group."""

    shard = "shard"
    """Every expert on one rank, as evenly as they go."""
    replicate = "replicate"
    """Every expert on every rank."""


class RowInit(Enum):
    """How a new expert's router row starts."""

    clone = "clone"
    """The source expert's row, with a bias set from measured gaps (`extension.affected_share`)."""
    clone_shared = "clone_shared"
    """The source's row; source and clone share one top-k slot and its weight: exact at step 0."""
    zero = "zero"
    mean = "mean"
    """Mean of the layer's frozen rows (an ablation of MoExtend)."""
    domain = "domain"
    """Mean hidden state of the new modality's tokens at that layer (FlexOlmo)."""


class ExpertInit(Enum):
    """How a new expert's weights start."""

    copy = "copy"
    """The source expert (MoExtend, section 2.3)."""
    drop_upcycle = "drop_upcycle"
    """The source with `extension.drop_ratio` of its neurons drawn anew (Drop-Upcycling)."""
    random = "random"
    """Small random weights: `extension.random_scale` times the deviation of the source's own."""


class ExpertType(Enum):
    full = "full"
    lora = "lora"
    """A low-rank difference to the source expert (Uni-MoE, stage 3)."""


class CalibrationKind(Enum):
    """How the chosen experts' probabilities are calibrated (MoExtend, table 5)."""

    mlp_add = "mlp_add"
    vector_add = "vector_add"
    none = "none"


class Precision(Enum):
    auto = "auto"
    """bf16 on a GPU and on processors with native bf16 products, else fp32."""
    bf16 = "bf16"
    fp32 = "fp32"


class FrozenFormat(Enum):
    """How `base.frozen_bits=4` keeps a number."""

    plain = "plain"
    """Evenly spaced values, a bf16 scale for 64 neighbours (`model/packed.py`)."""
    nf4 = "nf4"
    """Quantiles of a normal distribution, an fp32 scale for 64: bitsandbytes' format and kernels."""


class StageKind(Enum):
    train = "train"
    probe = "probe"
    """Train router differences, count selections before and after, choose layers, discard them."""
    extend = "extend"
    """Surgery only: add experts to the chosen layers and publish the result."""


class Trainable(Enum):
    """The parts that a stage may train. Everything else is frozen."""

    connector = "connector"
    router_delta = "router_delta"
    """A difference to every frozen router row, discarded after the probe."""
    new_experts = "new_experts"
    new_rows = "new_rows"
    calibration = "calibration"


@dataclass
class SpecialiseConfig:
    """How the identical copies of an upcycled base are made to differ (see `model/upcycle.py`)."""

    tokens: int = 8192
    """Tokens of text that the fit reads."""
    sequence_length: int = 512
    expert_width: int = 0
    """Neurons of a routed expert; 0: two thirds of the dense layer's, in a multiple of 64."""
    seed: int = 0


@dataclass
class BaseConfig:
    """The pretrained MoE language model, frozen."""

    path: str = ""
    """Folder of a Hugging Face checkpoint of a supported MoE architecture. Empty: upcycle
    `dense`."""
    dense: str = ""
    """Folder of a dense Hugging Face causal LM to upcycle, or `builtin:smollm2`."""
    num_experts: int = 4
    """Routed experts a sparse layer of an upcycled base."""
    top_k: int = 2
    sparse_every: int = 3
    """An upcycled base has a sparse layer every so many layers, counted from `sparse_offset`."""
    sparse_offset: int = 1
    specialise: SpecialiseConfig = field(default_factory=SpecialiseConfig)
    frozen_bits: int = 0
    """8 or 4 keeps the frozen experts' matrices in so many bits, half or a quarter of bf16's memory
    (`model/packed.py`); 0 in the run's precision. Exactness is then relative to the base so rounded."""
    frozen_format: FrozenFormat = FrozenFormat.plain
    """Of 4 bits: `nf4` errs less and needs the extra `nf4` (bitsandbytes)."""
    chat_template: bool = True
    """Use the tokenizer's chat template when it has one; else plain prompt and answer."""


@dataclass
class EncoderConfig:
    """One frozen modality encoder."""

    name: str = MISSING
    """`efficientnet_lite0`, or `hf_vision` for a CLIP or SigLIP tower from a local folder."""
    path: str = ""
    """Folder of the weights; empty for an encoder that a package ships."""
    image_size: int = 224
    tokens_per_item: int = 9
    """Tokens an image becomes: a square number; the feature grid is average-pooled to it."""
    feature_layer: int = -2
    """Hidden state of a vision tower that becomes the features (LLaVA's choice; MoExtend's code:
    -1)."""


@dataclass
class ConnectorConfig:
    hidden_dim: int = 1024
    """Width of the two-layer GELU MLP."""
    closed_form_samples: int = 1024
    """Training samples of the ridge regression that starts the connector; 0 starts it at random."""
    ridge: float = 1e-1
    """Penalty, relative to the features' mean squared value."""


@dataclass
class ExtensionConfig:
    """What training adds to the base."""

    name: str = "vision"
    num_new_experts: int = 1
    """New experts a chosen layer."""
    layers: list[int] = field(default_factory=list)
    """Decoder layers to extend; empty: the probe chooses."""
    source_expert: int = -1
    """The frozen expert that new ones start from in every layer; -1: the layer's most selected."""
    sources: dict[int, list[int]] = field(default_factory=dict)
    """Layer -> the frozen expert that each of its new experts starts from, -1 for the most selected
    that is not named: layers with numbers and sources of their own, in place of the three above."""
    layer_share: float = 0.5
    """Share of the sparse layers that the probe chooses (MoExtend: 0.5)."""
    scope: Scope = Scope.preserve
    placement: Placement = Placement.replicate
    expert_init: ExpertInit = ExpertInit.copy
    expert_type: ExpertType = ExpertType.full
    lora_rank: int = 8
    lora_alpha: float = 16.0
    """The low-rank difference is scaled by lora_alpha / lora_rank (Uni-MoE: 16 / 8)."""
    drop_ratio: float = 0.5
    random_scale: float = 0.1
    row_init: RowInit = RowInit.clone
    affected_share: float = 0.25
    """Share of the new modality's tokens whose expert set a cloned row may change at step 0."""
    calibration: CalibrationKind = CalibrationKind.mlp_add
    loss_free_rate: float = 0.0
    """Step of loss-free balancing (arXiv 2408.15664) of the new experts' choice; 0: none."""

    @property
    def named_layers(self) -> list[int]:
        """The layers to extend, where the configuration names them and the probe does not choose."""
        return sorted(self.sources) or self.layers


@dataclass
class StageConfig:
    """One phase of training."""

    kind: StageKind = StageKind.train
    train: list[Trainable] = field(default_factory=list)
    steps: int = 0
    sequences_per_rank: int = 8
    """Sequences of one rank's micro-batch."""
    accumulation: int = 1
    """Micro-batches a step."""
    learning_rate: float = 1e-3
    warmup_share: float = 0.03
    final_learning_rate_share: float = 0.0
    """The cosine ends at this share of `learning_rate`."""
    balance_coefficient: float = 0.0
    """Weight of the balance loss E * sum(f * P), 1.0 when even. MoExtend's 0.001 counts f summing
    to top_k and multiplies by 9: here top_k * 9 / E times that."""
    z_coefficient: float = 0.0
    router_kl_coefficient: float = 0.0
    """Weight of KL(base's routing || extended routing) of tokens that may choose new experts, before
    calibration; of sigmoid routers between shares of the scores."""
    checkpoint_every: int = 25
    """Steps between two published checkpoints inside the stage; 0: only at its end."""
    statistics_samples: int = 256
    """probe: samples whose expert selections are counted."""
    statistics_data: str = "probe"
    """probe: name of the stream of these samples; none of them is trained on."""
    spike_sigmas: float = 8.0
    """A step is skipped by all ranks when its loss or its gradient's norm is so many standard deviations
    above the mean of the last steps; 0: only when one of them is not finite."""
    spike_window: int = 128
    """The last steps taken, so many; none is a spike before half of them are known."""
    max_bad_steps: int = 10
    """Skipped steps in a row before the run stops."""
    data: str = "train"
    """Name of the sample stream in `data.streams`."""


@dataclass
class StreamConfig:
    """One named stream of samples: webdataset shards behind a manifest."""

    manifest: str = MISSING
    """Path or URL of the manifest that `moe-ext shards` writes."""
    weight: float = 1.0
    split: str = "train"
    """Which samples of the manifest, by its own split column; `all` takes every one."""
    shuffle: bool = True


class Features(Enum):
    """Where the frozen encoder's features of training images come from."""

    live = "live"
    """The encoder runs in every step."""
    cache = "cache"
    """The encoder runs once on every sample; its features are kept as shards in `cache_dir`, fp32."""
    cache_fp16 = "cache_fp16"
    """The same in half the space, rounded to half precision."""


@dataclass
class DataConfig:
    streams: dict[str, StreamConfig] = field(default_factory=dict)
    builtin: str = ""
    """Name of a small real data set to prepare when its shards are missing: `openmoji`."""
    limit: int = 0
    """Use only the first so many samples of the built-in set; 0 uses all. For smoke runs."""
    prompt: str = "A picture of"
    """Text between an image and its caption."""
    max_length: int = 128
    pack: bool = False
    """Fill rows of `sequence_length` tokens with several samples each."""
    sequence_length: int = 512
    """Tokens of a packed row; unpacked rows are padded to the longest of their batch."""
    homogeneous_span: int = 1
    """Neighbouring samples that come from one stream of a mixture. Set to the samples of a step
    over all ranks, every rank sees one stream, so one modality, a step (Uni-MoE's modality-level
    data parallelism)."""
    num_workers: int = 1
    shuffle_window: int = 4096
    """Samples within which the order is shuffled; shards are shuffled as a whole."""
    features: Features = Features.live
    bad_sample_budget: int = 100
    """Samples that all ranks together may skip in a stage, each logged, before the run stops."""
    shard_cache: str = ""
    """Folder of shards fetched from http(s) or s3, shared by the ranks of a machine; empty:
    `cache_dir`/shards."""
    shard_cache_bytes: int = 0
    """Size that folder is kept under; 0: no limit. It must hold the shards of a shuffle window."""
    fetch_timeout_s: float = 30.0
    """Longest silence of a server before the download is resumed."""
    fetch_tries: int = 6
    """Tries in a row without progress before a shard is given up."""
    shards_ahead: int = 2
    """Shards downloaded at a time, by each worker, before they are needed."""
    verify_local: bool = True
    """Check the SHA-256 of local shards, too: each is read whole the first time this machine uses it,
    and again after it changed. Sizes are checked in any case."""


@dataclass
class OptimConfig:
    """AdamW."""

    beta1: float = 0.9
    beta2: float = 0.99
    eps: float = 1e-8
    weight_decay: float = 0.0
    clip_norm: float = 1.0
    """Global norm to clip the gradient to; 0 does not clip."""


@dataclass
class ParallelConfig:
    auto: bool = False
    """Plan for `cluster` when composed: sets ep_size, zero_stage, frozen_placement and
    extension.placement, and is then false (`moe-ext plan` shows what it chooses from)."""
    planned: str = ""
    """What `auto` chose, in words; it writes this itself."""
    planned_ranks: int = 0
    """The number of ranks that `auto` planned for; another one is refused. 0: nothing was planned."""
    ep_size: int = 1
    """Ranks that share the frozen experts; divides the number of ranks."""
    zero_stage: int = 1
    frozen_placement: Placement = Placement.shard
    hot_experts: int = 0
    """Frozen experts a layer, the most selected of the probe's counts, that every rank of an
    expert-parallel group holds in the stages after the probe: no token travels for them."""
    hot_lists: dict[int, list[int]] = field(default_factory=dict)
    """Layer -> the hot experts by name, in place of `hot_experts`."""
    precision: Precision = Precision.auto
    activation_checkpointing: bool = False
    timeout_s: float = 600.0
    """A collective that waits longer ends the run with an error."""
    threads_per_rank: int = 0
    """Processor threads; 0 shares the machine's cores among its ranks."""


@dataclass
class AlertConfig:
    """What is worth an alert: on the console, in metrics.jsonl and in W&B. 0 switches a rule off."""

    window: int = 50
    """Logged steps that a value is compared with; a rule speaks once in so many."""
    loss_spike: float = 1.5
    """A loss this many times the median of the window."""
    gradient_spike: float = 10.0
    """A gradient norm this many times the median of the window."""
    dead_expert: int = 100
    """Logged steps in a row in which no token chose a new expert."""
    slow_loader: float = 0.5
    """Share of a window's time that went by waiting for data."""
    stalled_s: float = 300.0
    """Seconds without a finished step; below `parallel.timeout_s`, which ends the run."""


@dataclass
class TrackingConfig:
    wandb: bool = True
    """Offline where there is no key or no network; it can never stop a run."""
    wandb_project: str = "moe_ext"
    wandb_entity: str = ""
    wandb_timeout_s: float = 15.0
    """Longest wait for W&B's server at a stage's start, and three times that at its end."""
    tensorboard: bool = False
    """Event files in `run_dir`/tensorboard, a folder a stage; needs the extra `tensorboard`."""
    alerts: AlertConfig = field(default_factory=AlertConfig)
    log_every: int = 1
    """Steps between two lines of the log and of W&B."""
    progress: bool = True
    """A live bar on a terminal; plain lines elsewhere or when false."""


@dataclass
class EvaluationConfig:
    candidates: int = 60
    """Images and captions of the retrieval test."""
    splits: list[str] = field(default_factory=lambda: ["heldout", "heldout_concept"])
    """Splits of the held-out stream's manifest to test on; `probe` is the one to choose settings on."""
    captions: int = 12
    """Held-out images that the model writes captions for."""
    text_tokens: int = 8192
    """Tokens of held-out text."""


@dataclass
class TrainConfig:
    """A whole run."""

    name: str = MISSING
    """Name of the run, and of its folder."""
    seed: int = 0
    run_dir: str = "runs/${name}"
    """Where everything of this run goes; a run started again with the same folder goes on in it."""
    cache_dir: str = "runs/cache"
    """Upcycled bases and built-in shards, kept between runs."""
    keep_checkpoints: int = 2
    """Published checkpoints of the running stage to keep; a finished stage keeps its last one."""
    chain: list[str] = field(default_factory=list)
    """Names of the stages, in order."""
    stages: dict[str, StageConfig] = field(default_factory=dict)
    base: BaseConfig = field(default_factory=BaseConfig)
    encoder: dict[str, EncoderConfig] = field(default_factory=dict)
    """Modality name -> encoder; modality ids 1, 2, ... follow this order."""
    connector: ConnectorConfig = field(default_factory=ConnectorConfig)
    extension: ExtensionConfig = field(default_factory=ExtensionConfig)
    beside: dict[str, str] = field(default_factory=dict)
    """Any word -> a finished extension of the same base, which stands beside the new one and stays as
    it is: a finished run's folder, or what `moe-ext export --form extension` wrote."""
    beside_bias: dict[str, float] = field(default_factory=dict)
    """Word of `beside` -> added to the biases of its router rows: below 0 a token that may choose both
    chooses it less often."""
    data: DataConfig = field(default_factory=DataConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    tracking: TrackingConfig = field(default_factory=TrackingConfig)
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)
    launcher: LauncherConfig = field(default_factory=LauncherConfig)
    cluster: ClusterConfig = field(default_factory=ClusterConfig)
    """What `moe-ext plan` and `parallel=auto` plan for."""
