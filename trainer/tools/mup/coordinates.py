"""The coordinate check: measure how the size of activations, and their change after a few updates, depend on the width.

A coordinate is one activation on fixed held-out rows: the embedding's output, every layer's attention output, feed-forward
output and residual stream, the effect of its attention scores, and the logits. Its *size* is its root mean square at the start;
its *change* is the root mean square of the difference that the updates make. Under muP neither depends on the width, apart from
sums that are random at the start (`LAWS`). Weight decay is too slow to show here; `weight_decay` measures it.
"""

import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from itertools import islice
from math import log, nan, sqrt
from statistics import linear_regression
from typing import Any, Literal, cast

import torch
from torch import Tensor, nn

from tandem.trainer.config import TrainConfig
from tandem.trainer.config.flops import flops_per_token
from tandem.trainer.data.loader import Batch
from tandem.trainer.distributed.layers import reduce_from_tp
from tandem.trainer.distributed.mesh import Mesh, sum_over_ranks
from tandem.trainer.models.decoder import Decoder
from tandem.trainer.startup import build_engine
from tandem.trainer.tools.mup.measurement import Measurement
from tandem.trainer.tools.mup.progress_reporter import ProgressReporter
from tandem.trainer.tools.mup.proxies import build_loader, proxy_config, train_steps, with_constant_lr, with_precision

CoordinateRecord = dict[str, Any]
"""tp_size, precision, width, seed, step, and every coordinate's `size` and `change` after that many updates."""


@dataclass(frozen=True)
class Law:
    """Exponents of the width in a coordinate, and the rules that are most likely broken if it does not follow them."""

    size: float
    """Exponent of its size at the start."""
    change: tuple[float, float]
    """Least and greatest exponent of its change."""
    size_cause: str
    change_cause: str


_HIDDEN_INIT = "the init std of hidden matrices and residual outputs"
_HIDDEN_LR = "the learning rate of hidden matrices and residual outputs"
_SCORES_LR = "the learning rate of hidden matrices, or the attention scale"
_LOGITS_LR = "the output multiplier, or the learning rate of embedding and head"
LAWS = {
    "embedding": Law(0.0, (0.0, 0.0), "the embedding's init std or multiplier", "the embedding's learning rate"),
    "attention": Law(0.0, (-0.5, 0.0), _HIDDEN_INIT, _HIDDEN_LR),
    "ffn": Law(0.0, (-0.5, 0.0), _HIDDEN_INIT, _HIDDEN_LR),
    "stream": Law(0.0, (-0.5, 0.0), "the init std of residual outputs", _HIDDEN_LR),
    "scores": Law(-0.5, (-1.0, 0.0), "the attention scale", _SCORES_LR),
    "logits": Law(-0.5, (-1.0, 0.0), "the output multiplier or the head's init std", _LOGITS_LR),
}
"""Coordinate -> law.

The laws repeat the rules of `models.mup` on purpose: laws computed from its table would confirm a broken table. At the start,
queries are independent of keys and the last stream is independent of the head, so a sum of n products has size sqrt(n), and the
factor 1/n makes it 1/sqrt(n). (The exception is the logit of the token just read under a tied head, because the stream contains
that row itself. The check leaves this logit out.) A change has two parts. The part that the gradient has aligned has exponent
0. The part that is still random has 1/sqrt(n), and this twice in the products of scores and logits. Narrow models, few updates
and small learning rates show more of the random part. The embedding has no sum over the width at all.
Source: Yang et al. 2022, arXiv 2203.03466, appendix J and table 8.
"""

PRECISIONS: tuple[Literal["fp32", "bf16"], ...] = ("fp32", "bf16")
EXPONENT_TOLERANCE = 0.15
"""How far a measured exponent may be outside its law. The README lists the exponents of correct and of broken rules."""
MAX_ROW_TOKENS = 256
"""Tokens of a held-out row that are measured, because whole activations are kept twice."""
PEAK_LR_FRACTION = 0.125
"""Learning rate of the updates over the schedule's peak; there is no warm-up. At the peak itself, four updates change narrow
models by tens of times their size, far beyond first order, and exponents vary by 0.5 from seed to seed."""


def proxy_configs(config: TrainConfig, widths: list[int], num_seeds: int, tp_size: int) -> list[TrainConfig]:
    """The proxies of one tensor-parallel size: every width with every seed in both precisions."""
    seeded = range(config.run.seed, config.run.seed + num_seeds)
    at_widths = [proxy_config(config, width, tp_size=tp_size, seed=seed) for width in widths for seed in seeded]
    return [with_precision(found, precision) for found in at_widths for precision in PRECISIONS]


def measure(configs: list[TrainConfig], num_steps: int, mesh: Mesh) -> list[CoordinateRecord]:
    """Measure every proxy, in order."""
    records, flops = [], [flops_per_token(proxy.model, 0, causal=False) for proxy in configs]
    with ProgressReporter(f"coordinates at tp {mesh.tp_size}", sum(flops), enabled=mesh.rank == 0) as progress:
        for proxy, work in zip(configs, flops, strict=True):
            records += measure_proxy(proxy, num_steps, mesh)
            progress.advance(work, f"width {proxy.model.hidden_size}, {proxy.run.precision}, seed {proxy.run.seed}")
    return records


def measure_proxy(config: TrainConfig, num_steps: int, mesh: Mesh) -> list[CoordinateRecord]:
    """Measure one proxy at the start and after each of `num_steps` updates."""
    config = with_constant_lr(config, config.schedule.lr.peak * PEAK_LR_FRACTION)
    phase = config.schedule.phases[0]
    batch = next(build_loader(config).validation_batches(phase, phase.micro_batch_size * phase.seq_len))
    engine = build_engine(config, mesh, None)
    start = read_coordinates(engine.model, batch, mesh)
    records = [_build_record(config, 0, start, start, mesh)]
    for step, _ in enumerate(islice(train_steps(config, engine, mesh), num_steps)):
        records.append(_build_record(config, step + 1, read_coordinates(engine.model, batch, mesh), start, mesh))
    return records


@torch.no_grad()
def read_coordinates(model: nn.Module, batch: Batch, mesh: Mesh) -> dict[str, Tensor]:
    """Return every coordinate of the batch in fp32. Scores are those of this rank's heads."""
    assert isinstance(model, Decoder)
    captured: dict[str, Tensor] = {}
    tokens, documents = (part[:, :MAX_ROW_TOKENS].to(mesh.device) for part in (batch.tokens, batch.document_ids))
    with _capture_coordinates(model, captured):
        logits = model.logits(tokens, documents)
    if model.head is None:
        logits.scatter_(-1, tokens.unsqueeze(-1), 0.0)
    return {name: value.float() for name, value in captured.items()} | {"logits": logits}


def judge(records: list[CoordinateRecord]) -> list[Measurement]:
    """Fit the exponent of the width in every coordinate's size and change, for each case, and compare it with its law."""
    cases = dict.fromkeys((record["tp_size"], record["precision"]) for record in records)
    last_step = max(record["step"] for record in records)
    names = sorted(records[0]["size"], key=lambda name: list(LAWS).index(name.split()[0]))
    measurements = []
    for kind, step in (("size", 0), ("change", last_step)):
        for name in names:
            law = LAWS[name.split()[0]]
            low, high = (law.size, law.size) if kind == "size" else law.change
            cause = law.size_cause if kind == "size" else law.change_cause
            for tp_size, precision in cases:
                widths, values = coordinate_curve(records, tp_size, precision, kind, name, step)
                measurements.append(Measurement(
                    "coordinates", f"{kind} of {name}", f"tp {tp_size} {precision}", fit_exponent(widths, values),
                    low - EXPONENT_TOLERANCE, high + EXPONENT_TOLERANCE, cause,
                ))  # fmt: skip
    return measurements


def coordinate_curve(
    records: list[CoordinateRecord], tp_size: int, precision: str, kind: str, name: str, step: int
) -> tuple[list[int], list[float]]:
    """Return the widths, and for each the coordinate's size or change after `step` updates (root mean square over seeds)."""
    squares: dict[int, list[float]] = {}
    for record in records:
        if (record["tp_size"], record["precision"], record["step"]) == (tp_size, precision, step):
            squares.setdefault(record["width"], []).append(record[kind][name] ** 2)
    return list(squares), [sqrt(sum(values) / len(values)) for values in squares.values()]


def fit_exponent(widths: list[int], values: list[float]) -> float:
    """Fit the exponent of the width by least squares. Returns NaN if a value is 0, as in a frozen model."""
    if min(values) <= 0:
        return nan
    x, y = ([log(number) for number in numbers] for numbers in (widths, values))
    return linear_regression(x, y).slope


def _build_record(
    config: TrainConfig, step: int, current: dict[str, Tensor], start: dict[str, Tensor], mesh: Mesh
) -> CoordinateRecord:
    squares = [float(value.square().mean()) for value in current.values()]
    squares += [float((current[name] - start[name]).square().mean()) for name in current]
    # All ranks have the same coordinates, except the scores, of which each has those of as many heads.
    means = [sqrt(square / mesh.world_size) for square in sum_over_ranks(squares)]
    return {
        "tp_size": mesh.tp_size, "precision": config.run.precision, "width": config.model.hidden_size,
        "seed": config.run.seed, "step": step,
        "size": dict(zip(current, means, strict=False)),
        "change": dict(zip(current, means[len(current) :], strict=True)),
    }  # fmt: skip


@contextmanager
def _capture_coordinates(model: Decoder, captured: dict[str, Tensor]) -> Iterator[None]:
    """Store the coordinates of a forward pass inside the block in `captured`."""

    def keep(module: nn.Module, name: str, transform: Callable[[Tensor], Tensor] = lambda output: output) -> Any:
        return module.register_forward_hook(lambda module, inputs, output: captured.update({name: transform(output)}))

    handles = [model.layers[0].register_forward_pre_hook(lambda module, inputs: captured.update(embedding=inputs[0]))]
    for index, layer in enumerate(cast(Iterable[Any], model.layers)):
        handles += [
            keep(layer.attention, f"attention {index}", partial(_full_branch_output, layer.attention.out.bias)),
            keep(layer.ffn, f"ffn {index}", partial(_full_branch_output, layer.ffn.down.bias)),
            keep(layer, f"stream {index}"),
        ]
    # The model's module calls the kernel by this name, after norms and rotary positions.
    family = sys.modules[type(model).__module__]
    kernel = family.attention
    family.attention = _capture_scores(kernel, captured)  # type: ignore[attr-defined]
    try:
        yield
    finally:
        family.attention = kernel  # type: ignore[attr-defined]
        for handle in handles:
            handle.remove()


def _full_branch_output(bias: Tensor | None, partial_sum: Tensor) -> Tensor:
    """Compute what the branch adds to the stream from this rank's partial sum."""
    summed = reduce_from_tp(
        partial_sum.clone()
    )  # the all-reduce is in place, and the model still needs its partial sum
    return summed if bias is None else summed + bias


def _capture_scores(kernel: Callable[..., Tensor], captured: dict[str, Tensor]) -> Callable[..., Tensor]:
    """Wrap the kernel to store the effect of its scores: its output minus the output for queries of zero, relative to the size
    of the head's values.

    Small scores are proportional to this effect. Unlike products of queries and keys, it shows the scale that the kernel really
    applies.
    """

    def attention(query: Tensor, key: Tensor, value: Tensor, **rest: Any) -> Tensor:
        # In fp32, because the difference is smaller than the rounding of a bf16 output.
        q, k, v = (each.float() for each in (query, key, value))
        effect = kernel(q, k, v, **rest) - kernel(torch.zeros_like(q), k, v, **rest)
        index = sum(name.startswith("scores") for name in captured)
        value_sizes = v.square().mean((0, 1, 3)).sqrt().repeat_interleave(query.shape[2] // key.shape[2])
        captured[f"scores {index}"] = effect / value_sizes[:, None]
        return kernel(query, key, value, **rest)

    return attention
