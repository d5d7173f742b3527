"""Every section of the YAML as a frozen dataclass, in the order of the file.

A line under a field is its documentation: meaning, unit, what zero or null means. Derived numbers are functions elsewhere.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal


class UserError(ValueError):
    """A user's mistake in one line: the field or file, its value, the rule, the remedy. Commands exit with 2 on it."""


@dataclass(frozen=True)
class RunConfig:
    name: str
    """Name of the run: its folder below `root`, its wandb run."""
    seed: int
    """Every random draw is keyed by this number and a name."""
    root: str = "runs"
    """Folder that holds the run folders."""
    precision: Literal["bf16", "fp32"] = "bf16"
    """bf16: bf16 weights and activations, fp32 master weights, gradient accumulation and reduction. fp32: all in fp32."""
    init_from: str | None = None
    """Folder written by `tandem import-hf` whose weights start the run; null draws them from `seed`."""
    stop_step: int | None = None
    """Save and end after this many steps although the schedule goes on; null runs the schedule to its end."""
    max_repeat_failures: int = 3
    """Starts, one after another, that may fail at the same step; the next one is refused. 0 refuses none."""


@dataclass(frozen=True)
class ModelConfig:
    """What both families have."""

    family: str
    """stablelm or btlm."""
    hidden_size: int
    """Size of the residual stream."""
    num_layers: int
    """Number of layers."""
    num_heads: int
    """Number of query heads; head_dim is hidden_size / num_heads."""
    ffn_hidden_size: int
    """Inner size of the gated feed-forward network (true, unpadded)."""
    vocab_size: int
    """Number of token ids the model can read and predict (true, unpadded); at least the tokenizer's."""
    norm_eps: float
    """Added to the variance in every LayerNorm."""
    init_std: float
    """Standard deviation of the initial embedding; of every matrix where muP is off."""
    init_truncation_sigmas: float
    """Initial normals are cut at this many standard deviations; 0 does not cut."""
    document_masking: bool
    """Tokens attend only within their own document, and rotary positions restart with it."""

    @property
    def head_dim(self) -> int:
        return self.hidden_size // self.num_heads


@dataclass(frozen=True)
class StableLMConfig(ModelConfig):
    num_kv_heads: int
    """Number of key and value heads; divides num_heads."""
    partial_rotary_factor: float
    """Leading share of head_dim that is rotated."""
    rotary_base: float
    """Base of the rotary frequencies."""
    parallel_residual: bool
    """true: x + attention(norm(x)) + ffn(norm(x)) with one shared norm. false: one after the other, two norms."""
    qk_layernorm: bool
    """LayerNorm without bias over head_dim on queries and keys before rotation, one weight vector for every head."""
    qkv_bias: bool
    """Bias on the query, key and value projections."""
    norm_bias: bool
    """Bias on block and final norms."""
    tie_word_embeddings: bool
    """The output head is the embedding matrix."""


@dataclass(frozen=True)
class AlibiScalingConfig:
    """Position interpolation: ALiBi's slopes are divided by one number. The keys are those of the published config.json."""

    type: Literal["linear"]
    """linear, the one kind there is."""
    factor: float | None = None
    """Fixed: the divisor, above 1. To fine-tune on longer rows, their length / the length of the rows before."""
    train_seq_len: int | None = None
    """Dynamic: the divisor is a row's length / this number in rows that are longer, else 1."""


@dataclass(frozen=True)
class BTLMConfig(ModelConfig):
    tie_word_embeddings: bool
    """The output head is the embedding matrix."""
    alibi_scaling: AlibiScalingConfig | None = None
    """Position interpolation, with factor or train_seq_len; null reads distances as they are. No weight depends on it."""

    @property
    def num_kv_heads(self) -> int:
        return self.num_heads


@dataclass(frozen=True)
class MupConfig:
    """Maximal update parametrisation; the rules are one table in `models/mup.py`."""

    base_hidden_size: int
    """Width at which the hyperparameters were tuned; the width multiplier is model.hidden_size / base_hidden_size."""
    embedding_multiplier: float
    """Factor on the embedding's output."""
    output_multiplier: float
    """Factor on the logits before they are divided by the width multiplier."""


@dataclass(frozen=True)
class PhaseConfig:
    name: str
    """Shown in progress, metrics and plots."""
    tokens: int
    """Length of the phase in tokens: a multiple of global_batch_size * seq_len."""
    seq_len: int
    """Tokens in a row."""
    global_batch_size: int
    """Rows in a global batch."""
    micro_batch_size: int
    """Rows in one forward pass on one data-parallel rank."""
    mixture: dict[str, float]
    """Share of the rows from each source of `data.sources`; sums to 1."""

    @property
    def tokens_per_step(self) -> int:
        return self.global_batch_size * self.seq_len

    @property
    def num_steps(self) -> int:
        return self.tokens // self.tokens_per_step


@dataclass(frozen=True)
class LRConfig:
    kind: str
    """linear, cosine or hybrid."""
    peak: float
    """Learning rate at the end of the warm-up."""
    final: float
    """Learning rate at the end of the decay (hybrid: the minimum of its cosine, which it does not reach)."""
    warmup_steps: int
    """Linear from 0 at step 0 to peak at this step."""
    decay_steps: int | None
    """Linear and cosine: steps from the end of the warm-up to `final`; null decays to the last step of the run."""


@dataclass(frozen=True)
class LinearLRConfig(LRConfig):
    """peak to final on a straight line."""


@dataclass(frozen=True)
class CosineLRConfig(LRConfig):
    """peak to final on half a cosine."""


@dataclass(frozen=True)
class HybridLRConfig(LRConfig):
    """Cosine, then inverse square root with value and slope continuous at the switch, then an optional linear cooldown."""

    switch_fraction: float
    """The cosine gives way after this share of decay_steps (which is the cosine's full period here)."""
    offset_steps: int
    """Steps subtracted from the step before the formula is applied: 0 counts the warm-up in, warmup_steps leaves it out."""
    cooldown_start_step: int | None
    """First step of the cooldown, which starts from the learning rate of that step; null has none."""
    cooldown_steps: int
    """Length of the cooldown."""
    cooldown_final: float
    """Learning rate at the end of the cooldown."""


@dataclass(frozen=True)
class ScheduleConfig:
    tokens_per_step: int | None
    """Tokens in a global batch, the same in every phase; null lets phases differ."""
    phases: list[PhaseConfig]
    """In order; the run ends with the last."""
    lr: LRConfig
    """One line over all phases."""


@dataclass(frozen=True)
class OptimConfig:
    beta1: float
    """AdamW: decay of the first moment."""
    beta2: float
    """AdamW: decay of the second moment."""
    eps: float
    """AdamW: added to the root of the second moment."""
    weight_decay: float
    """Decoupled decay of matrices and embeddings; norms and biases have none."""
    max_grad_norm: float
    """Largest global gradient norm; 0 does not clip."""


@dataclass(frozen=True)
class ParallelConfig:
    tp_size: int
    """Ranks that share one replica of the model; data-parallel size is the number of ranks / tp_size."""
    zero_stage: Literal[0, 1]
    """1: optimizer state is divided over data-parallel ranks. 0: every rank holds all of it; fp32 only."""
    recompute: Literal["none", "selective", "full"]
    """Activations computed again in backward: none, the attention and feed-forward products, or whole layers."""
    bucket_elements: int = 500_000_000
    """Largest number of gradient elements reduced, or weights gathered, in one call."""


@dataclass(frozen=True)
class ShardCacheConfig:
    """Copies of shards that lie elsewhere (s3://, gs://, https://), shared by the ranks of a node."""

    folder: str = "~/.cache/tandem/shards"
    """Local folder of the copies."""
    max_size_gib: float = 64.0
    """Room for the copies; the shards not read for longest are removed to stay within it.

    Up to a quarter more is on disk while removed copies are still read.
    """
    max_attempts: int = 8
    """Tries to fetch a shard, a growing pause between them, before the run stops."""
    timeout_seconds: float = 30.0
    """Longest wait for the next bytes of a shard before a try counts as failed."""

    def retry_delay_seconds(self, num_failures: int) -> float:
        """Between the try that was the `num_failures`-th to fail, from 1, and the next: each twice the one before, up to a
        timeout.

        There is no chance in them, so that a run's log can be read against the settings.
        """
        return min(2.0 ** (num_failures - 1) / 64, 1) * self.timeout_seconds


@dataclass(frozen=True)
class DataConfig:
    sources: dict[str, str]
    """Name of each source and the folder, or remote address, of the corpus `tandem prepare` wrote for it. A source that the
    run has read stays here under its name, also when later phases give it no share.
    """
    tokenizer: str | None = None
    """tokenizer.json that the corpora must have been prepared with; null trusts the manifests."""
    num_workers: int = 1
    """Threads that read ahead; 0 reads when asked. The rows do not depend on it."""
    prefetch_steps: int = 2
    """Global batches read ahead by the workers; 0 reads when asked."""
    shuffle_block_tokens: int = 8_192
    """Neighbouring tokens that stay together when the corpus is shuffled; best the longest seq_len. 0 reads it in order."""
    shuffle_window_tokens: int = 33_554_432
    """Blocks are shuffled within runs of this many tokens, so that a step reads from few shards."""
    max_epochs: dict[str, float] = field(default_factory=dict)
    """How often a source may be read, at most; a source that is left out may be read without end."""
    at_end: Literal["refuse", "stop"] = "refuse"
    """When max_epochs cannot feed the whole schedule: refuse the run, or stop it after the last step that can be fed."""
    damaged_shards: Literal["stop", "skip"] = "stop"
    """A shard that is missing, truncated or altered stops the run, or is left out from then on, on record.

    One that cannot be reached always stops the run.
    """
    cache: ShardCacheConfig = ShardCacheConfig()
    """Where copies of remote shards are kept."""


@dataclass(frozen=True)
class EvaluateConfig:
    every_steps: int
    """Steps between validation losses; 0 never validates."""
    tokens: int
    """Held-out tokens per validation: a multiple of every phase's seq_len."""


@dataclass(frozen=True)
class CheckpointConfig:
    every_steps: int
    """Steps between saves; 0 saves only at the end and on a signal."""
    keep_last: int
    """Newest checkpoints kept; older ones are removed after a newer one is committed. 0 keeps all."""


@dataclass(frozen=True)
class GuardConfig:
    """What becomes of a step whose loss or gradient is bad. Decided before the update, once for all ranks."""

    spike_sigmas: float = 0.0
    """A loss or gradient norm that lies so many robust standard deviations above the median of the last good steps is bad.
    0: only what is not finite is.
    """
    window_steps: int = 128
    """Good steps that a step is compared with; none is seen as a spike before there are so many, of its sequence length, rows
    and mixture.
    """
    max_skips: int = 3
    """Bad steps in a row whose update is left out. With the next one the run goes back to its last checkpoint and passes over
    the rows read since.
    """
    max_rollbacks: int = 2
    """Times that the run goes back to the same checkpoint; after that a bad step ends it."""


@dataclass(frozen=True)
class WatchdogConfig:
    """When a run that does not move is ended, to be started again."""

    step_timeout_seconds: float | None = None
    """Longest that a part of a step or a batch of a validation may take; null: ten times the median of the last steps, at least
    a minute. 0 waits for ever.
    """
    start_timeout_seconds: float = 1_800.0
    """Longest from the start to the end of the first step, compilation included, and longest wait for a save, for a rollback
    and for the last records of a run. 0 waits for ever.
    """


@dataclass(frozen=True)
class LogConfig:
    every_steps: int = 10
    """Steps between lines of progress where the output is not a terminal. metrics.jsonl has every step."""
    wandb: Literal["auto", "online", "offline", "disabled"] = "auto"
    """auto: online with an API key, else offline into the run folder."""
    wandb_project: str = "tandem"
    """Project the run is shown under."""


@dataclass(frozen=True)
class DebugConfig:
    deterministic: bool = True
    """Same config, same machine: same bits. false allows faster kernels that do not promise that."""
    compare_replicas_every_steps: int = 0
    """Steps between comparisons of the weights of all data-parallel replicas, bit by bit; 0 never compares."""
    immediate_gradients: bool = True
    """bf16: a weight's gradient is added to the step's fp32 sum and freed as soon as backward has made it. false adds all of
    them after backward: the same bits, two bytes more for each parameter, for comparing speed and memory."""


@dataclass(frozen=True)
class HardwareConfig:
    """One kind of accelerator, from configs/hardware/."""

    name: str
    """As people call it."""
    peak_flops: float
    """Dense bf16 floating-point operations per second of one device, the denominator of MFU."""
    memory_gib: float
    """Memory of one device."""
    memory_bytes_per_second: float
    """Memory bandwidth of one device."""
    devices_per_node: int
    """Devices in one node."""


@dataclass(frozen=True)
class TrainConfig:
    run: RunConfig
    model: StableLMConfig | BTLMConfig
    mup: MupConfig | None
    schedule: ScheduleConfig
    optim: OptimConfig
    parallel: ParallelConfig
    data: DataConfig
    evaluate: EvaluateConfig
    checkpoint: CheckpointConfig
    guard: GuardConfig
    watchdog: WatchdogConfig
    log: LogConfig
    debug: DebugConfig
    hardware: HardwareConfig | None
    """Name of a file in hardware/ beside the config; null measures a matmul at the start and takes that for the peak."""


MODEL_CONFIGS: dict[str, type[StableLMConfig] | type[BTLMConfig]] = {"stablelm": StableLMConfig, "btlm": BTLMConfig}
LR_CONFIGS: dict[str, type[LRConfig]] = {"linear": LinearLRConfig, "cosine": CosineLRConfig, "hybrid": HybridLRConfig}
