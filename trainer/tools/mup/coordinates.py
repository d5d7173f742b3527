"""The coordinate check: measure how the size of activations, and their change after a few updates, depend on the width.

A coordinate is one activation on fixed held-out rows: the embedding's output, every layer's attention output, feed-forward
output and residual stream, the effect of its attention scores, and the logits. Its *size* is its root mean square at the start.
Its *change* is the root mean square of the difference after some updates. Under muP neither depends on the width, except for
sums that are random at the start (`LAWS`). Weight decay is too slow to be visible here; `weight_decay` measures it.
"""

import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from functools import partial
from itertools import islice
from math import log, nan, sqrt
from statistics import linear_regression
from typing import Any, Literal, cast

import torch
from torch import Tensor, nn

from tandem.trainer.config import LinearLRConfig, TrainConfig
from tandem.trainer.config.flops import flops_per_token
from tandem.trainer.data.loader import Batch
from tandem.trainer.distributed.layers import reduce_from_tp
from tandem.trainer.distributed.mesh import Mesh, sum_over_ranks
from tandem.trainer.models.decoder import Decoder
from tandem.trainer.startup import build_engine
from tandem.trainer.tools.mup.measurement import Measurement
from tandem.trainer.tools.mup.progress_report import report_progress
from tandem.trainer.tools.mup.proxies import proxy_config, with_lr
from tandem.trainer.tools.mup.training import build_loader, train_steps

CoordinateRecord = dict[str, Any]
"""tp_size, precision, width, seed, step, and every coordinate's `size` and `change` after that many updates."""


_HIDDEN_INIT = "the init std of hidden matrices and residual outputs"
_HIDDEN_LR = "the learning rate of hidden matrices and residual outputs"
_LOGITS_LR = "the output multiplier, or the learning rate of embedding and head"
LAWS = {
    "embedding": {"size": (0.0, 0.0, "the embedding's init std or multiplier"),
                  "change": (0.0, 0.0, "the embedding's learning rate")},
    "attention": {"size": (0.0, 0.0, _HIDDEN_INIT), "change": (-0.5, 0.0, _HIDDEN_LR)},
    "ffn": {"size": (0.0, 0.0, _HIDDEN_INIT), "change": (-0.5, 0.0, _HIDDEN_LR)},
    "stream": {"size": (0.0, 0.0, "the init std of residual outputs"), "change": (-0.5, 0.0, _HIDDEN_LR)},
    "scores": {"size": (-0.5, -0.5, "the attention scale"),
               "change": (-1.0, 0.0, "the learning rate of hidden matrices, or the attention scale")},
    "logits": {"size": (-0.5, -0.5, "the output multiplier or the head's init std"), "change": (-1.0, 0.0, _LOGITS_LR)},
}  # fmt: skip
"""Coordinate -> for its size and its change: least and greatest exponent of the width, and the rules that are most likely
broken if the measured exponent is outside.

The laws deliberately repeat the rules of `models.mup`, because laws computed from its table would confirm a broken table. At
the start, queries are independent of keys and the last stream is independent of the head. A sum of n products then has size
sqrt(n), and the factor 1/n makes it 1/sqrt(n). (The exception is the logit of the token just read under a tied head, because
the stream contains that row itself. The check leaves this logit out.) A change has two parts. The part that the gradient has
aligned has exponent 0. The part that is still random is proportional to 1/sqrt(n), or to 1/n in the products of scores and
logits. Narrow models, few updates and small learning rates show more of the random part. The embedding has no sum over the
width at all.
Source: Yang et al. 2022, arXiv 2203.03466, appendix J and table 8.
"""

PRECISIONS: tuple[Literal["fp32", "bf16"], ...] = ("fp32", "bf16")
EXPONENT_TOLERANCE = 0.15
"""Allowed distance of a measured exponent from its law. The README lists the exponents of correct and of broken rules."""
MAX_ROW_TOKENS = 256
"""Tokens of a held-out row that are measured. More would need much memory, because all activations are kept twice."""
PEAK_LR_FRACTION = 0.125
"""Constant learning rate of the updates, as a fraction of the schedule's peak. At the peak itself, four updates change narrow
models by tens of times their size, far beyond first order, and exponents vary by 0.5 from seed to seed."""


def proxy_configs(config: TrainConfig, widths: list[int], num_seeds: int, tp_size: int) -> list[TrainConfig]:
    """Return the proxies of one tensor-parallel size: every width with every seed in both precisions."""
    seeds = range(config.run.seed, config.run.seed + num_seeds)
    proxies = [proxy_config(config, width, tp_size=tp_size, seed=seed) for width in widths for seed in seeds]
    return [replace(each, run=replace(each.run, precision=precision)) for each in proxies for precision in PRECISIONS]


def measure(configs: list[TrainConfig], num_steps: int, mesh: Mesh) -> list[CoordinateRecord]:
    """Measure every proxy, in order."""
    records, flops = [], [flops_per_token(proxy.model, 0, causal=False) for proxy in configs]
    with report_progress(f"coordinates at tp {mesh.tp_size}", sum(flops), enabled=mesh.rank == 0) as advance:
        for proxy, work in zip(configs, flops, strict=True):
            records += measure_proxy(proxy, num_steps, mesh)
            advance(work, f"width {proxy.model.hidden_size}, {proxy.run.precision}, seed {proxy.run.seed}")
    return records


def measure_proxy(config: TrainConfig, num_steps: int, mesh: Mesh) -> list[CoordinateRecord]:
    """Measure one proxy at the start and after each of `num_steps` updates."""
    # The rate is constant, so that the first update moves the weights as far as any other.
    phase, lr = config.schedule.phases[0], config.schedule.lr.peak * PEAK_LR_FRACTION
    config = with_lr(config, LinearLRConfig("linear", lr, lr, 0, None))
    batch = next(build_loader(config).validation_batches(phase, phase.micro_batch_size * phase.seq_len))
    engine = build_engine(config, mesh, None)
    start = read_coordinates(engine.model, batch, mesh)
    records = [_build_record(config, 0, start, start, mesh)]
    for step, _ in enumerate(islice(train_steps(config, engine, mesh), num_steps)):
        records.append(_build_record(config, step + 1, read_coordinates(engine.model, batch, mesh), start, mesh))
    return records


@torch.no_grad()
def read_coordinates(model: nn.Module, batch: Batch, mesh: Mesh) -> dict[str, Tensor]:
    """Return every coordinate of the batch in fp32. The scores are only those of this rank's heads."""
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
            low, high, cause = LAWS[name.split()[0]][kind]
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
    # All ranks have the same coordinates. Only the scores differ, and each rank has those of the same number of heads.
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

    with ExitStack() as hooks:

        def keep(module: nn.Module, name: str, transform: Callable[[Tensor], Tensor] = lambda output: output) -> None:
            hook = module.register_forward_hook(lambda _, inputs, output: captured.update({name: transform(output)}))
            hooks.enter_context(hook)

        hook = model.layers[0].register_forward_pre_hook(lambda _, inputs: captured.update(embedding=inputs[0]))
        hooks.enter_context(hook)
        for index, layer in enumerate(cast(Iterable[Any], model.layers)):
            keep(layer.attention, f"attention {index}", partial(_full_branch_output, layer.attention.out.bias))
            keep(layer.ffn, f"ffn {index}", partial(_full_branch_output, layer.ffn.down.bias))
            keep(layer, f"stream {index}")
        # The model's module calls the attention kernel by this name, after norms and rotary embedding.
        family = cast(Any, sys.modules[type(model).__module__])
        hooks.callback(setattr, family, "attention", family.attention)
        family.attention = _capture_scores(family.attention, captured)
        yield


def _full_branch_output(bias: Tensor | None, partial_sum: Tensor) -> Tensor:
    """Compute what the branch adds to the stream from this rank's partial sum."""
    # Cloned because the all-reduce is in place, and the model still needs its partial sum.
    summed = reduce_from_tp(partial_sum.clone())
    return summed if bias is None else summed + bias


def _capture_scores(kernel: Callable[..., Tensor], captured: dict[str, Tensor]) -> Callable[..., Tensor]:
    """Wrap the kernel so that it also stores the effect of its scores: its output minus the output for queries of zero,
    relative to the size of the head's values.

    The effect is proportional to the scores if they are small. Unlike products of queries and keys, it shows the scale that the
    kernel really applies.
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
