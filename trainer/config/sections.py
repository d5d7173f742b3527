"""The sections of the YAML as frozen dataclasses, in the order of the file.

The text under a field gives its meaning, its unit and what 0 or null means. Derived numbers are computed elsewhere.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Literal

from tandem.trainer.config.constraints import HomePath, Pattern, Range, SelectedBy

SHIPPED_CONFIGS = Path(__file__).resolve().parents[2] / "configs"
"""The configs that ship: beside `trainer` in the repository and in an installation."""


class UserError(ValueError):
    """A user's mistake, in one line: field or file, value, rule, remedy. Commands print it and exit with code 2."""

    def __init__(self, message: str):
        super().__init__(message.replace("\n", "\\n"))  # keys and names of files may contain newlines


PathText = Annotated[str, HomePath()]
NameText = Annotated[
    str,
    Pattern("[^\x00-\x1f\x7f-\x9f\u2028-\u202e\u2066-\u2069]{1,200}", "1 to 200 characters without control characters"),
]
# The largest values are beyond every honest use. They keep a mistyped number from filling memory, waiting for years or
# overflowing later, and they are no advice.
Count = Annotated[int, Range(at_least=0, at_most=10**12)]
PositiveCount = Annotated[int, Range(at_least=1, at_most=10**12)]
Tokens = Annotated[int, Range(at_least=1, at_most=10**16)]
RowLength = Annotated[int, Range(at_least=1, at_most=1 << 24)]
Rows = Annotated[int, Range(at_least=1, at_most=1 << 20)]
Width = Annotated[int, Range(at_least=1, at_most=1 << 22)]
Factor = Annotated[float, Range(above=0, at_most=10**6)]
Seconds = Annotated[float, Range(at_least=0, at_most=10**8)]


@dataclass(frozen=True)
class RunConfig:
    name: NameText
    """Name of the run, of its folder in `root` and of its wandb run."""
    seed: int
    """Seed of all random numbers; each draw also depends on its own name."""
    root: PathText = "runs"
    """Folder that contains the run folders."""
    precision: Literal["bf16", "fp32"] = "bf16"
    """bf16: weights and activations in bf16; master weights, gradient accumulation and reduction in fp32. fp32: all in fp32."""
    init_from: PathText | None = None
    """Folder with the initial weights, written by `tandem import-hf`; null initialises them from `seed`."""
    init_from_tokenizer: Literal["same", "any"] = "same"
    """same: refuse corpora of another tokenizer than that of `init_from`. any: start also if its ids mean other tokens."""
    stop_step: PositiveCount | None = None
    """Save and exit after this many steps, before the end of the schedule; null runs the whole schedule."""
    max_repeat_failures: Count = 3
    """Consecutive starts that may fail at the same step; the next start is refused. 0 never refuses."""


@dataclass(frozen=True)
class ModelConfig:
    """Fields of both families."""

    family: str
    """stablelm or btlm."""
    hidden_size: Width
    """Width of the residual stream."""
    num_layers: Annotated[int, Range(at_least=1, at_most=10_000)]
    """Number of layers."""
    num_heads: Annotated[int, Range(at_least=1, at_most=1 << 16)]
    """Number of query heads; head_dim is hidden_size / num_heads."""
    ffn_hidden_size: Width
    """Inner width of the gated feed-forward network, without padding."""
    vocab_size: Annotated[int, Range(at_least=1, at_most=1 << 24)]
    """Number of token ids, without padding; at least that of the tokenizer."""
    norm_eps: Annotated[float, Range(above=0, at_most=1)]
    """Epsilon added to the variance in every LayerNorm."""
    init_std: Annotated[float, Range(above=0, at_most=1_000)]
    """Standard deviation of the initial embedding and, without muP, of every initial matrix."""
    init_truncation_sigmas: float
    """Initial normal values are truncated at this many standard deviations; 0 does not truncate."""
    document_masking: bool
    """Whether attention stays within a document and rotary positions restart at each document."""

    @property
    def head_dim(self) -> int:
        return self.hidden_size // self.num_heads


@dataclass(frozen=True)
class StableLMConfig(ModelConfig):
    num_kv_heads: Annotated[int, Range(at_least=1, at_most=1 << 16)]
    """Number of key and value heads; divides num_heads."""
    partial_rotary_factor: float
    """Fraction of head_dim that is rotated, from its start."""
    rotary_base: Annotated[float, Range(above=0, at_most=10**12)]
    """Base of the rotary frequencies."""
    parallel_residual: bool
    """true: x + attention(norm(x)) + ffn(norm(x)) with one shared norm. false: attention, then ffn, with two norms."""
    qk_layernorm: bool
    """LayerNorm without bias over head_dim of queries and keys, before rotation; each head has its own weights."""
    qkv_bias: bool
    """Bias on the query, key and value projections."""
    norm_bias: bool
    """Bias on the norms of the layers and the final norm."""
    tie_word_embeddings: bool
    """Whether the output head shares the embedding matrix."""


@dataclass(frozen=True)
class AlibiScalingConfig:
    """Position interpolation: ALiBi's slopes are divided by one number. The keys are those of the published config.json.

    Set either `factor` or `train_seq_len`.
    """

    type: Literal["linear"]
    """linear, the only type."""
    factor: float | None = None
    """Fixed divisor, above 1. To fine-tune on longer rows, use new row length / old row length."""
    train_seq_len: int | None = None
    """Row length of the training. The divisor is row length / this number for longer rows, and 1 for others."""


@dataclass(frozen=True)
class BTLMConfig(ModelConfig):
    tie_word_embeddings: bool
    """Whether the output head shares the embedding matrix."""
    alibi_scaling: AlibiScalingConfig | None = None
    """Position interpolation; null has none. No weight depends on it."""

    @property
    def num_kv_heads(self) -> int:
        return self.num_heads


AnyModelConfig = StableLMConfig | BTLMConfig
"""The model section of a config: one class per family."""


@dataclass(frozen=True)
class MupConfig:
    """Maximal update parametrisation; the rules are one table in `models/mup.py`."""

    base_hidden_size: Annotated[int | float, Range(above=0, at_most=1 << 22)]
    """Width at which the hyperparameters were tuned. The width multiplier is model.hidden_size / base_hidden_size.

    Published folders store the inverse of the multiplier, so the width of an import need not be a whole number.
    """
    embedding_multiplier: Factor
    """Factor applied to the output of the embedding."""
    output_multiplier: Factor
    """Factor applied to the logits, which are also divided by the width multiplier."""
    scale_qk_dot_by_d: bool = True
    """true: attention scores are multiplied by 1 / head_dim, the rule of muP. false: by 1 / sqrt(head_dim)."""


@dataclass(frozen=True)
class PhaseConfig:
    name: NameText
    """Name in progress lines, metrics and plots; unique."""
    tokens: Tokens
    """Length of the phase in tokens, a multiple of global_batch_size * seq_len."""
    seq_len: RowLength
    """Tokens in a row."""
    global_batch_size: Rows
    """Rows in a global batch."""
    micro_batch_size: Rows
    """Rows in one forward pass on one data-parallel rank."""
    mixture: dict[str, float]
    """Source in `data.sources` -> its fraction of the rows. The fractions sum to 1."""

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
    peak: Annotated[float, Range(above=0, at_most=1_000)]
    """Learning rate at the end of the warm-up."""
    final: float
    """Learning rate at the end of the decay. For hybrid: the minimum of its cosine, which it does not reach."""
    warmup_steps: int
    """Steps of the linear warm-up from 0 to peak; 0 has none."""
    decay_steps: PositiveCount | None
    """Steps from the end of the warm-up to `final` (hybrid: full period of the cosine); null ends at the run's last step."""


@dataclass(frozen=True)
class LinearLRConfig(LRConfig):
    """A straight line from peak to final."""


@dataclass(frozen=True)
class CosineLRConfig(LRConfig):
    """Half a cosine from peak to final."""


@dataclass(frozen=True)
class HybridLRConfig(LRConfig):
    """Cosine, then inverse square root (value and slope continuous at the switch), then an optional linear cooldown."""

    switch_fraction: float
    """Fraction of decay_steps after which the cosine ends."""
    offset_steps: int
    """Steps subtracted before the formula is applied: 0 includes the warm-up, warmup_steps excludes it."""
    cooldown_start_step: Count | None
    """First step of the cooldown, which starts from the learning rate of that step; null has no cooldown."""
    cooldown_steps: Count
    """Length of the cooldown in steps."""
    cooldown_final: Annotated[float, Range(at_least=0, at_most=1_000)]
    """Learning rate at the end of the cooldown."""


@dataclass(frozen=True)
class ScheduleConfig:
    tokens_per_step: Tokens | None
    """Tokens in a global batch, checked in every phase; null lets phases differ."""
    phases: list[PhaseConfig]
    """Phases in order; the run ends with the last."""
    lr: Annotated[LRConfig, SelectedBy("kind", LR_CONFIGS)]
    """Learning rate, one schedule over all phases."""


@dataclass(frozen=True)
class OptimConfig:
    beta1: float
    """AdamW: decay of the first moment."""
    beta2: float
    """AdamW: decay of the second moment."""
    eps: Annotated[float, Range(above=0, at_most=1)]
    """AdamW: added to the square root of the second moment."""
    weight_decay: Annotated[float, Range(at_least=0, at_most=10**6)]
    """Decoupled weight decay of matrices and embeddings; norms and biases have none."""
    max_grad_norm: Annotated[float, Range(at_least=0, at_most=10**12)]
    """The global gradient norm is clipped to this value; 0 does not clip."""


@dataclass(frozen=True)
class ParallelConfig:
    tp_size: Annotated[int, Range(at_least=1, at_most=1024)]
    """Tensor-parallel ranks per replica of the model. The data-parallel size is number of ranks / tp_size."""
    zero_stage: Literal[0, 1]
    """1: optimizer state is sharded over data-parallel ranks. 0: every rank holds all of it; fp32 only."""
    recompute: Literal["none", "selective", "full"]
    """Activations recomputed in backward: none, those of attention and feed-forward products, or whole layers."""
    bucket_elements: PositiveCount = 500_000_000
    """Maximum number of gradient elements reduced, or weights gathered, in one call."""


@dataclass(frozen=True)
class ShardCacheConfig:
    """Local copies of remote shards (s3://, gs://, https://), shared by the ranks of a node."""

    folder: str = "~/.cache/tandem/shards"
    """Local folder of the copies, which belongs to one user and which no other user can change. Runs of this user share it."""
    max_size_gib: Annotated[float, Range(above=0, at_most=1 << 30)] = 64.0
    """Maximum size; the least recently read copies are removed. Removed copies that are still read may use a quarter more."""
    max_attempts: Annotated[int, Range(at_least=1, at_most=1000)] = 8
    """Attempts to download a shard, with growing delays, before the run stops."""
    timeout_seconds: Annotated[float, Range(above=0, at_most=10**6)] = 30.0
    """Longest wait for the next bytes of a shard before an attempt fails."""
    min_bytes_per_second: Annotated[float, Range(at_least=0, at_most=10**12)] = 4096.0
    """Lowest average rate of a server over twice the timeout; an attempt that is slower fails. 0 permits any rate.

    The default is below that of a telephone modem, and a shard of 200 MB would take 14 hours at it.
    """

    def retry_delay_seconds(self, num_failures: int) -> float:
        """Return the delay after the `num_failures`-th failure, from 1: it doubles each time, up to the timeout.

        It is not random, so a log can be compared with the settings.
        """
        return min(2.0 ** (num_failures - 1) / 64, 1) * self.timeout_seconds


@dataclass(frozen=True)
class DataConfig:
    sources: dict[NameText, PathText]
    """Source -> folder or remote address of a corpus written by `tandem prepare`.

    A source that the run has read must stay here, even if no later phase uses it.
    """
    tokenizer: PathText | None = None
    """tokenizer.json with which the corpora must have been prepared; null trusts the manifests."""
    num_workers: Annotated[int, Range(at_least=0, at_most=1024)] = 1
    """Threads that prefetch batches; 0 does not prefetch. Does not change the rows."""
    prefetch_steps: Annotated[int, Range(at_least=0, at_most=1024)] = 2
    """Global batches to prefetch; 0 does not prefetch."""
    shuffle_block_tokens: Count = 8_192
    """Adjacent tokens that stay together in the shuffle; use the longest seq_len. 0 does not shuffle."""
    shuffle_window_tokens: Tokens = 33_554_432
    """Blocks are shuffled within windows of this many tokens, so that a step reads from few shards."""
    max_epochs: dict[str, Annotated[float, Range(above=0, at_most=10**9)]] = field(default_factory=dict)
    """Source -> maximum number of times it is read; a source not listed has no limit."""
    at_end: Literal["refuse", "stop"] = "refuse"
    """If max_epochs is too low for the schedule: refuse to start, or stop after the last step that has data."""
    damaged_shards: Literal["stop", "skip"] = "stop"
    """If a shard is missing, truncated or altered: stop, or skip it from then on and write that to the ledger.

    A shard that cannot be reached always stops the run.
    """
    cache: ShardCacheConfig = ShardCacheConfig()
    """Local cache of remote shards."""


@dataclass(frozen=True)
class EvaluateConfig:
    every_steps: Count
    """Steps between validations; 0 never validates."""
    tokens: Annotated[int, Range(at_least=0, at_most=10**16)]
    """Held-out tokens per validation, a multiple of every phase's seq_len."""


@dataclass(frozen=True)
class CheckpointConfig:
    every_steps: Count
    """Steps between saves; 0 saves only at the end and on a signal."""
    keep_last: Count
    """Number of newest checkpoints to keep; 0 keeps all. Old ones are removed after a newer one is committed."""


@dataclass(frozen=True)
class GuardConfig:
    """How the run handles a step with a bad loss or gradient norm. All ranks decide the same, before the update."""

    spike_sigmas: Annotated[float, Range(at_least=0, at_most=10**6)] = 0.0
    """Robust standard deviations above the median of the last good steps from which a step is bad; 0: only if not finite."""
    window_steps: Annotated[int, Range(at_least=8, at_most=100_000)] = 128
    """Last good steps to compare with. Detection starts after this many steps of one seq_len, batch size and mixture."""
    max_skips: Count = 3
    """Consecutive bad steps whose update is skipped. One more rolls back to the last checkpoint and skips the rows since."""
    max_rollbacks: Count = 2
    """Rollbacks to the same checkpoint; after that, a bad step ends the run."""


@dataclass(frozen=True)
class WatchdogConfig:
    """When to end a run that hangs, so that it can be restarted."""

    step_timeout_seconds: Seconds | None = None
    """Limit for a part of a step or a validation batch; null: ten times the median step, at least 60 s. 0 has no limit."""
    start_timeout_seconds: Seconds = 1_800.0
    """Limit from the start to the end of the first step, and for a save, a rollback or the end of a run. 0 has no limit."""


@dataclass(frozen=True)
class LogConfig:
    every_steps: PositiveCount = 10
    """Steps between progress lines if the output is not a terminal. metrics.jsonl has every step."""
    wandb: Literal["auto", "online", "offline", "disabled"] = "auto"
    """auto: online if there is an API key, otherwise offline, into the run folder."""
    wandb_project: NameText = "tandem"
    """wandb project."""


@dataclass(frozen=True)
class DebugConfig:
    deterministic: bool = True
    """true: the same config on the same machine gives the same bits. false allows faster kernels without this guarantee."""
    compare_replicas_every_steps: Count = 0
    """Steps between bitwise comparisons of the weights of all data-parallel replicas; 0 never compares."""
    immediate_gradients: bool = True
    """bf16: add each gradient to the fp32 sum and free it during backward. false adds them after backward: the same bits, two
    more bytes per parameter; only for comparisons of speed and memory."""


@dataclass(frozen=True)
class HardwareConfig:
    """An accelerator, from configs/hardware/."""

    name: str
    """Display name."""
    peak_flops: Annotated[float, Range(above=0, at_most=10**20)]
    """Peak dense bf16 FLOP/s of one device, the denominator of MFU."""
    memory_gib: Factor
    """Memory of one device."""
    memory_bytes_per_second: Annotated[float, Range(above=0, at_most=10**18)]
    """Memory bandwidth of one device."""
    devices_per_node: Annotated[int, Range(at_least=1, at_most=1 << 16)]
    """Devices in one node."""


@dataclass(frozen=True)
class TrainConfig:
    run: RunConfig
    model: Annotated[AnyModelConfig, SelectedBy("family", MODEL_CONFIGS)]
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
    """A file in hardware/, beside this config or the shipped ones; null measures a matrix product at the start as the peak."""


MODEL_CONFIGS: dict[str, type[AnyModelConfig]] = {"stablelm": StableLMConfig, "btlm": BTLMConfig}
LR_CONFIGS: dict[str, type[LRConfig]] = {"linear": LinearLRConfig, "cosine": CosineLRConfig, "hybrid": HybridLRConfig}
