"""The YAML of a run as frozen dataclasses, in the order of the file, and `load`, the one way to read it.

Nothing here is ever written back: derived numbers are functions elsewhere, runtime facts live in `parallel.mesh.Mesh`.
A line under a field is its documentation: meaning, unit, what zero or null means. This module imports only the standard
library and omegaconf, so that commands which merely look at a config answer at once.
"""

from __future__ import annotations

import dataclasses
import difflib
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args, get_origin, get_type_hints

from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

PADDING_MULTIPLE = 128
"""Feed-forward width and vocabulary are rounded up to a multiple of this times tp_size inside the model, never outside."""


class UserError(ValueError):
    """A user's mistake in one line: the field or file, its value, the rule, the remedy. Commands exit with 2 on it."""


@dataclass(frozen=True)
class Run:
    name: str
    """Name of the run: its folder below `root`, its wandb run."""
    seed: int
    """Every random draw is keyed by this number and a name."""
    root: str = "runs"
    """Folder that holds the run folders."""
    precision: Literal["bf16", "fp32"] = "bf16"
    """bf16: bf16 weights and activations, fp32 master weights, gradient accumulation and reduction. fp32: all in fp32."""
    initial_weights: str | None = None
    """Folder written by `tandem import-hf` whose weights start the run; null draws them from `seed`."""
    stop_step: int | None = None
    """Save and end after this many steps although the schedule goes on; null runs the schedule to its end."""


@dataclass(frozen=True)
class Model:
    """What both families have."""

    family: str
    """stablelm or btlm."""
    width: int
    """Size of the residual stream."""
    depth: int
    """Number of layers."""
    heads: int
    """Number of query heads; head_dim is width / heads."""
    ffn_width: int
    """Inner size of the gated feed-forward network (true, unpadded)."""
    vocab: int
    """Number of token ids the model can read and predict (true, unpadded); at least the tokenizer's."""
    norm_epsilon: float
    """Added to the variance in every LayerNorm."""
    init_std: float
    """Standard deviation of the initial embedding; of every matrix where muP is off."""
    init_truncation_sigmas: float
    """Initial normals are cut at this many standard deviations; 0 does not cut."""
    document_masking: bool
    """Tokens attend only within their own document, and rotary positions restart with it."""

    @property
    def head_dim(self) -> int:
        return self.width // self.heads


@dataclass(frozen=True)
class StableLM(Model):
    kv_heads: int
    """Number of key and value heads; divides heads."""
    rotary_fraction: float
    """Leading share of head_dim that is rotated."""
    rotary_base: float
    """Base of the rotary frequencies."""
    parallel_residual: bool
    """true: x + attention(norm(x)) + ffn(norm(x)) with one shared norm. false: one after the other, two norms."""
    qk_norm: bool
    """LayerNorm without bias over head_dim on queries and keys before rotation, one weight vector for every head."""
    qkv_bias: bool
    """Bias on the query, key and value projections."""
    norm_bias: bool
    """Bias on block and final norms."""
    tied_head: bool
    """The output head is the embedding matrix."""


@dataclass(frozen=True)
class BTLM(Model):
    tied_head: bool
    """The output head is the embedding matrix."""

    @property
    def kv_heads(self) -> int:
        return self.heads


@dataclass(frozen=True)
class Mup:
    """Maximal update parametrisation; the rules are one table in `models/mup.py`."""

    base_width: int
    """Width at which the hyperparameters were tuned; the width multiplier is model.width / base_width."""
    embedding_multiplier: float
    """Factor on the embedding's output."""
    output_multiplier: float
    """Factor on the logits before they are divided by the width multiplier."""


@dataclass(frozen=True)
class Phase:
    name: str
    """Shown in progress, metrics and plots."""
    tokens: int
    """Length of the phase in tokens: a multiple of rows * seq_len."""
    seq_len: int
    """Tokens in a row."""
    rows: int
    """Rows in a global batch."""
    micro_rows: int
    """Rows in one forward pass on one data-parallel rank."""
    mixture: dict[str, float]
    """Share of the rows from each source of `data.sources`; sums to 1."""

    @property
    def batch_tokens(self) -> int:
        return self.rows * self.seq_len

    @property
    def steps(self) -> int:
        return self.tokens // self.batch_tokens


@dataclass(frozen=True)
class LearningRate:
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
class Linear(LearningRate):
    """peak to final on a straight line."""


@dataclass(frozen=True)
class Cosine(LearningRate):
    """peak to final on half a cosine."""


@dataclass(frozen=True)
class Hybrid(LearningRate):
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
class Schedule:
    batch_tokens: int | None
    """Tokens in a global batch, the same in every phase; null lets phases differ."""
    phases: list[Phase]
    """In order; the run ends with the last."""
    lr: LearningRate
    """One line over all phases."""


@dataclass(frozen=True)
class Optim:
    beta1: float
    """AdamW: decay of the first moment."""
    beta2: float
    """AdamW: decay of the second moment."""
    epsilon: float
    """AdamW: added to the root of the second moment."""
    weight_decay: float
    """Decoupled decay of matrices and embeddings; norms and biases have none."""
    clip_norm: float
    """Largest global gradient norm; 0 does not clip."""


@dataclass(frozen=True)
class Parallel:
    tp_size: int
    """Ranks that share one replica of the model; data-parallel size is the number of ranks / tp_size."""
    zero_stage: Literal[0, 1]
    """1: optimizer state is divided over data-parallel ranks. 0: every rank holds all of it; fp32 only."""
    recompute: Literal["none", "selective", "full"]
    """Activations computed again in backward: none, the attention and feed-forward products, or whole layers."""
    bucket_elements: int = 500_000_000
    """Largest number of gradient elements reduced, or weights gathered, in one call."""


@dataclass(frozen=True)
class Data:
    sources: dict[str, str]
    """Name of each source and the folder `tandem prepare` wrote for it."""
    tokenizer: str | None = None
    """tokenizer.json that the corpora must have been prepared with; null trusts the manifests."""
    prefetch_steps: int = 2
    """Global batches read ahead in the background; 0 reads when asked."""
    block_tokens: int = 8_192
    """Neighbouring tokens that stay together when the corpus is shuffled; best the longest seq_len. 0 reads it in order."""
    window_tokens: int = 33_554_432
    """Blocks are shuffled within runs of this many tokens, so that a step reads from few shards."""


@dataclass(frozen=True)
class Evaluate:
    every_steps: int
    """Steps between validation losses; 0 never validates."""
    tokens: int
    """Held-out tokens per validation: a multiple of every phase's seq_len."""


@dataclass(frozen=True)
class Checkpoint:
    every_steps: int
    """Steps between saves; 0 saves only at the end and on a signal."""
    keep: int
    """Newest checkpoints kept; older ones are removed after a newer one is committed. 0 keeps all."""


@dataclass(frozen=True)
class Log:
    every_steps: int = 10
    """Steps between lines of progress where the output is not a terminal. metrics.jsonl has every step."""
    wandb: Literal["auto", "online", "offline", "disabled"] = "auto"
    """auto: online with an API key, else offline into the run folder."""
    wandb_project: str = "tandem"
    """Project the run is shown under."""


@dataclass(frozen=True)
class Debug:
    deterministic: bool = True
    """Same config, same machine: same bits. false allows faster kernels that do not promise that."""


@dataclass(frozen=True)
class Hardware:
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
class RunConfig:
    run: Run
    model: StableLM | BTLM
    mup: Mup | None
    schedule: Schedule
    optim: Optim
    parallel: Parallel
    data: Data
    evaluate: Evaluate
    checkpoint: Checkpoint
    log: Log
    debug: Debug
    hardware: Hardware | None
    """Name of a file in hardware/ beside the config; null measures a matmul at the start and takes that for the peak."""


FAMILIES: dict[str, type[StableLM] | type[BTLM]] = {"stablelm": StableLM, "btlm": BTLM}
LEARNING_RATES: dict[str, type[LearningRate]] = {"linear": Linear, "cosine": Cosine, "hybrid": Hybrid}


def load(path: str | Path, overrides: list[str] | None = None) -> RunConfig:
    """The checked config of the file with dotted overrides (`optim.clip_norm=0.5`) applied.

    Raises: UserError, one line naming field, value, rule and remedy.
    """
    path = Path(path)
    if not path.is_file():
        raise UserError(f"{path}: no such config file; name one, for example configs/demo-btlm.yaml")
    try:
        node = OmegaConf.load(path)
        for override in overrides or []:
            key, equals, value = override.partition("=")
            if not key or not equals:
                raise UserError(
                    f"override {override!r}: must read section.field=value; for example optim.clip_norm=0.5"
                )
            try:
                OmegaConf.update(node, key, OmegaConf.from_dotlist([f"value={value}"])["value"])
            except (IndexError, TypeError, ValueError) as error:
                raise UserError(f"override {override!r}: {_one_line(error)}; name a field of the config") from None
        tree = OmegaConf.to_container(node, resolve=True)
    except (OmegaConfBaseException, OSError) as error:
        raise UserError(f"{path}: cannot be read: {_one_line(error)}; correct the file or the override") from None
    except Exception as error:  # PyYAML's errors share no base class with omegaconf's
        if not type(error).__module__.startswith("yaml"):
            raise
        raise UserError(f"{path}: not valid YAML: {_one_line(error)}; correct the file") from None
    if not isinstance(tree, dict):
        raise UserError(
            f"{path}: holds {type(tree).__name__}; a config is a mapping of sections; start from a shipped one"
        )
    if isinstance(tree.get("hardware"), str):
        tree["hardware"] = _hardware(path.parent / "hardware", tree["hardware"])
    config: RunConfig = _build(RunConfig, tree, "")
    check(config)
    return config


def dump(config: RunConfig) -> str:
    """The YAML that `load` reads back into the same config."""
    return str(OmegaConf.to_yaml(OmegaConf.create(dataclasses.asdict(config))))


def section_from(kind: Any, tree: dict[str, Any], where: str) -> Any:
    """One section (for example `Model` from a checkpoint's manifest) as its frozen dataclass; strict like `load`."""
    return _build(kind, tree, where)


def check(config: RunConfig) -> None:
    """Raises UserError for the first rule between fields that the config breaks."""
    model, schedule = config.model, config.schedule
    _check_model(model)
    if config.mup is not None:
        _positive(config.mup, "mup", "base_width", "embedding_multiplier", "output_multiplier")
    if not schedule.phases:
        raise UserError("schedule.phases: is empty; a run has at least one phase; add one")
    for index, phase in enumerate(schedule.phases):
        _check_phase(config, f"schedule.phases[{index}]", phase)
    names = [phase.name for phase in schedule.phases]
    if len(set(names)) != len(names):
        raise UserError(f"schedule.phases: names {names}; each phase has its own name; rename one")
    _check_learning_rate(config)
    _positive(config.optim, "optim", "epsilon")
    for name in ("beta1", "beta2"):
        value = getattr(config.optim, name)
        if not 0 <= value < 1:
            raise UserError(f"optim.{name}: {value}; must be at least 0 and below 1; the recipes use 0.9 and 0.95")
    for section, name in (
        (config.optim, "weight_decay"), (config.optim, "clip_norm"), (config.evaluate, "every_steps"),
        (config.checkpoint, "every_steps"), (config.checkpoint, "keep"), (config.data, "prefetch_steps"),
        (config.data, "block_tokens"),
    ):  # fmt: skip
        if getattr(section, name) < 0:
            where = type(section).__name__.lower()
            raise UserError(f"{where}.{name}: {getattr(section, name)}; must not be negative; 0 turns it off")
    _positive(config.data, "data", "window_tokens")
    _positive(config.parallel, "parallel", "tp_size", "bucket_elements")
    _positive(config.log, "log", "every_steps")
    if config.parallel.zero_stage == 0 and config.run.precision == "bf16":
        # The gradients of a second micro-batch would be added in bf16.
        raise UserError(
            "parallel.zero_stage: 0 with run.precision bf16; gradients are accumulated in fp32, which DeepSpeed does "
            "from stage 1 on; set zero_stage to 1 or precision to fp32"
        )
    if "/" in config.run.name or config.run.name in ("", ".", ".."):
        raise UserError(f"run.name: {config.run.name!r}; is the name of one folder; leave out slashes")
    if config.run.stop_step is not None and config.run.stop_step < 1:
        raise UserError(f"run.stop_step: {config.run.stop_step}; must be at least 1; null runs the schedule to its end")


def check_world(config: RunConfig, world_size: int) -> None:
    """Raises UserError where model or phases do not divide over `world_size` ranks."""
    tp_size, model = config.parallel.tp_size, config.model
    if world_size % tp_size:
        raise UserError(
            f"parallel.tp_size: {tp_size} does not divide the {world_size} ranks of this launch; "
            "start a multiple of tp_size ranks or change tp_size"
        )
    dp_size = world_size // tp_size
    for name, value in (("heads", model.heads), ("kv_heads", model.kv_heads)):
        if value % tp_size:
            raise UserError(f"model.{name}: {value} is not divisible by parallel.tp_size {tp_size}; lower tp_size")
    for index, phase in enumerate(config.schedule.phases):
        if phase.rows % (dp_size * phase.micro_rows):
            raise UserError(
                f"schedule.phases[{index}].rows: {phase.rows} is not divisible by data-parallel size {dp_size} "
                f"({world_size} ranks / tp_size {tp_size}) times micro_rows {phase.micro_rows}; "
                "change the number of ranks or micro_rows"
            )


def _check_model(model: StableLM | BTLM) -> None:
    _positive(model, "model", "width", "depth", "heads", "ffn_width", "vocab", "norm_epsilon", "init_std")
    if model.width % model.heads:
        raise UserError(
            f"model.width: {model.width} is not divisible by model.heads {model.heads}; "
            "head_dim is width / heads; change one of them"
        )
    if model.init_truncation_sigmas < 0:
        raise UserError(
            f"model.init_truncation_sigmas: {model.init_truncation_sigmas}; must not be negative; 0 does not cut"
        )
    if isinstance(model, BTLM):
        return
    _positive(model, "model", "kv_heads", "rotary_base")
    if model.heads % model.kv_heads:
        raise UserError(
            f"model.kv_heads: {model.kv_heads} does not divide model.heads {model.heads}; "
            "each key head serves the same number of query heads; change one of them"
        )
    rotated = model.rotary_fraction * model.head_dim
    if not 0 < model.rotary_fraction <= 1 or rotated != int(rotated) or int(rotated) % 2:
        raise UserError(
            f"model.rotary_fraction: {model.rotary_fraction} of head_dim {model.head_dim} is {rotated:g}; "
            "must be an even whole number of dimensions; change the fraction"
        )


def _check_phase(config: RunConfig, where: str, phase: Phase) -> None:
    _positive(phase, where, "tokens", "seq_len", "rows", "micro_rows")
    declared = config.schedule.batch_tokens
    if declared is not None and phase.batch_tokens != declared:
        raise UserError(
            f"{where}.rows: {phase.rows} rows of {phase.seq_len} tokens are {phase.batch_tokens}; "
            f"schedule.batch_tokens says {declared} in every phase; change rows, or set batch_tokens to null"
        )
    if phase.tokens % phase.batch_tokens:
        nearest = max(1, round(phase.tokens / phase.batch_tokens)) * phase.batch_tokens
        raise UserError(
            f"{where}.tokens: {phase.tokens} is not a multiple of rows * seq_len = {phase.batch_tokens}; "
            f"a phase is a whole number of steps; the nearest is {nearest}"
        )
    if phase.rows % phase.micro_rows:
        raise UserError(f"{where}.micro_rows: {phase.micro_rows} does not divide rows {phase.rows}; choose a divisor")
    for name, share in phase.mixture.items():
        if name not in config.data.sources:
            known = ", ".join(config.data.sources) or "none"
            raise UserError(
                f"{where}.mixture: {name!r} is not a source; data.sources has {known}; add it or correct the name"
            )
        if share < 0:
            raise UserError(
                f"{where}.mixture.{name}: {share}; a share must not be negative; leave the source out for none"
            )
    total = sum(phase.mixture.values())
    if abs(total - 1) > 1e-6:
        raise UserError(f"{where}.mixture: shares sum to {total:g}; must sum to 1; for one source write {{name: 1.0}}")
    if config.evaluate.every_steps and (config.evaluate.tokens < 1 or config.evaluate.tokens % phase.seq_len):
        raise UserError(
            f"evaluate.tokens: {config.evaluate.tokens} is not a multiple of {where}.seq_len {phase.seq_len}; "
            "validation rows are whole; change it"
        )


def _check_learning_rate(config: RunConfig) -> None:
    lr, total = config.schedule.lr, sum(phase.steps for phase in config.schedule.phases)
    _positive(lr, "schedule.lr", "peak")
    if not 0 <= lr.final <= lr.peak:
        raise UserError(f"schedule.lr.final: {lr.final}; must lie between 0 and peak {lr.peak}; change one of them")
    if not 0 <= lr.warmup_steps < total:
        raise UserError(
            f"schedule.lr.warmup_steps: {lr.warmup_steps}; must be below the {total} steps of the run; lower it"
        )
    if lr.decay_steps is not None and lr.decay_steps < 1:
        raise UserError(
            f"schedule.lr.decay_steps: {lr.decay_steps}; must be at least 1; null decays to the end of the run"
        )
    if not isinstance(lr, Hybrid):
        return
    if not 0 < lr.switch_fraction < 0.5:
        raise UserError(
            f"schedule.lr.switch_fraction: {lr.switch_fraction}; must lie between 0 and 0.5, where the cosine falls; "
            "Stable LM 2 uses 0.25"
        )
    if lr.offset_steps < 0 or lr.offset_steps > lr.warmup_steps:
        raise UserError(
            f"schedule.lr.offset_steps: {lr.offset_steps}; must lie between 0 and warmup_steps {lr.warmup_steps}; change it"
        )
    if lr.cooldown_start_step is not None and (lr.cooldown_steps < 1 or lr.cooldown_start_step < lr.warmup_steps):
        raise UserError(
            f"schedule.lr.cooldown_steps: {lr.cooldown_steps} from step {lr.cooldown_start_step}; a cooldown follows the "
            "warm-up and has at least 1 step; change them, or set cooldown_start_step to null"
        )


def _positive(section: Any, where: str, *names: str) -> None:
    for name in names:
        if getattr(section, name) <= 0:
            raise UserError(f"{where}.{name}: {getattr(section, name)}; must be positive; change it")


def _hardware(folder: Path, name: str) -> Any:
    file = folder / f"{name}.yaml"
    if not file.is_file():
        known = ", ".join(sorted(path.stem for path in folder.glob("*.yaml"))) or "none"
        raise UserError(f"hardware: {name!r} has no file in {folder}; known there: {known}; name one of them or null")
    try:
        return OmegaConf.to_container(OmegaConf.load(file))
    except Exception as error:  # PyYAML's errors share no base class with omegaconf's
        if not type(error).__module__.startswith(("yaml", "omegaconf")):
            raise
        raise UserError(f"{file}: not valid YAML: {_one_line(error)}; correct the file") from None


def _build(kind: Any, value: Any, where: str) -> Any:
    """`value` (plain YAML data) as an instance of the annotation `kind`; strict about keys and types."""
    origin, arguments = get_origin(kind), get_args(kind)
    if origin is Literal:
        if value not in arguments or isinstance(value, bool):
            raise UserError(f"{where}: {value!r}; must be one of {', '.join(map(str, arguments))}; change it")
        return value
    if origin is list:
        if not isinstance(value, list):
            raise UserError(f"{where}: {value!r}; must be a list; write one entry per line with a dash")
        return [_build(arguments[0], item, f"{where}[{index}]") for index, item in enumerate(value)]
    if origin is dict:
        if not isinstance(value, dict):
            raise UserError(f"{where}: {value!r}; must be a mapping of names; write name: value")
        return {str(key): _build(arguments[1], item, f"{where}.{key}") for key, item in value.items()}
    if type(None) in arguments:
        (present,) = (argument for argument in arguments if argument is not type(None))
        return None if value is None else _build(present, value, where)
    if kind == StableLM | BTLM:
        kind = _chosen(FAMILIES, value, where, "family")
    elif kind is LearningRate:
        kind = _chosen(LEARNING_RATES, value, where, "kind")
    if dataclasses.is_dataclass(kind):
        return _build_section(kind, value, where)
    if kind is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if type(value) is not kind:
        raise UserError(f"{where}: {value!r} is {type(value).__name__}; must be {kind.__name__}; change it")
    return value


def _build_section(kind: Any, value: Any, where: str) -> Any:
    if not isinstance(value, dict):
        raise UserError(f"{where}: {value!r}; must be a section with fields; see configs/ for a complete file")
    hints, fields = get_type_hints(kind), {entry.name: entry for entry in dataclasses.fields(kind)}
    prefix = f"{where}." if where else ""
    for key in value:
        if key not in fields:
            near = difflib.get_close_matches(str(key), fields, n=1)
            remedy = f"did you mean {near[0]}?" if near else f"known: {', '.join(fields)}"
            raise UserError(f"{prefix}{key}: {_shown(value[key])}; no such field; {remedy}")
    for name, entry in fields.items():
        if name not in value and entry.default is dataclasses.MISSING and entry.default_factory is dataclasses.MISSING:
            if dataclasses.is_dataclass(hints[name]) and all(
                inner.default is not dataclasses.MISSING for inner in dataclasses.fields(hints[name])
            ):
                continue
            raise UserError(f"{prefix}{name}: missing; the config has no value for it; add {prefix}{name}")
    return kind(**{
        name: _build(hints[name], value.get(name, {}), f"{prefix}{name}")
        for name, entry in fields.items()
        if name in value or (entry.default is dataclasses.MISSING and entry.default_factory is dataclasses.MISSING)
    })  # fmt: skip


def _chosen(kinds: dict[str, Any], value: Any, where: str, key: str) -> Any:
    chosen = value.get(key) if isinstance(value, dict) else None
    if chosen not in kinds:
        raise UserError(f"{where}.{key}: {chosen!r}; must be one of {', '.join(kinds)}; change it")
    return kinds[chosen]


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())[:300]
