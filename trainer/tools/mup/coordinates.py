"""The coordinate check: how large the activations of a proxy are and how far some updates move them, against its width.

A coordinate is one activation on fixed held-out rows: the embedding's output, every layer's attention output, feed-forward
output and residual stream, what its attention scores do, the logits. Its *size* is its root mean square at the start, its
*change* that of the difference some updates make. muP is the parametrisation in which neither depends on the width, but for
what is random at the start (`EXPECTED_EXPONENTS`). Weight decay is too slow to be seen here: that is what `decay` is for.
"""

import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from itertools import islice
from math import log, nan, sqrt
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
"""tp_size, precision, width, seed, step, and for every coordinate its `size` and `change` after that many updates."""

EXPECTED_EXPONENTS = {
    "embedding": (0.0, 0.0, 0.0),
    "attention": (0.0, -0.5, 0.0),
    "ffn": (0.0, -0.5, 0.0),
    "stream": (0.0, -0.5, 0.0),
    "scores": (-0.5, -1.0, 0.0),
    "logits": (-0.5, -1.0, 0.0),
}
"""Exponent of the width in a coordinate's size at the start, and the least and greatest in its change.

Said here once more and not taken from `models.mup`, or a broken table would confirm itself. At the start queries and keys,
and the last stream and the head, are independent: a sum of n products is sqrt(n) large, and 1/n makes it 1/sqrt(n). (But for
the row of a tied head that a position has read: its own square is in the stream. That logit is left out.) A change
is the sum of a part that the gradient aligned, whose exponent is 0, and of a part that is still random: 1/sqrt(n), twice in
the products of scores and logits. Narrow models, few updates and small learning rates show more of the random part. The
embedding has no sum over the width at all.
Source: Yang et al. 2022, arXiv 2203.03466, appendix J and table 8.
"""

PRECISIONS: tuple[Literal["fp32", "bf16"], ...] = ("fp32", "bf16")
EXPONENT_TOLERANCE = 0.15
"""How far a measured exponent may lie outside its law: the README has what correct and broken rules measure."""

MAX_ROW_TOKENS = 256
"""Tokens of a held-out row that are looked at: whole activations are held twice."""

PEAK_LR_FRACTION = 0.125
"""Updates are made at this share of the schedule's peak, without warm-up. At the peak itself, four updates change
narrow models by tens of times their sizes: far from the first order, exponents scatter by 0.5 from seed to seed."""

LIKELY_CAUSES = {
    ("size", "embedding"): "the embedding's init std or multiplier",
    ("size", "attention"): "the init std of hidden matrices and residual outputs",
    ("size", "ffn"): "the init std of hidden matrices and residual outputs",
    ("size", "stream"): "the init std of residual outputs",
    ("size", "scores"): "the attention scale",
    ("size", "logits"): "the output multiplier or the head's init std",
    ("change", "embedding"): "the embedding's learning rate",
    ("change", "attention"): "the learning rate of hidden matrices and residual outputs",
    ("change", "ffn"): "the learning rate of hidden matrices and residual outputs",
    ("change", "stream"): "the learning rate of hidden matrices and residual outputs",
    ("change", "scores"): "the learning rate of hidden matrices, or the attention scale",
    ("change", "logits"): "the output multiplier, or the learning rate of embedding and head",
}


def proxy_configs(config: TrainConfig, widths: list[int], num_seeds: int, tp_size: int) -> list[TrainConfig]:
    """What is measured at one tensor-parallel size: every width in both precisions, with every seed."""
    seeded = range(config.run.seed, config.run.seed + num_seeds)
    at_widths = [proxy_config(config, width, tp_size=tp_size, seed=seed) for width in widths for seed in seeded]
    return [with_precision(found, precision) for found in at_widths for precision in PRECISIONS]


def measure(configs: list[TrainConfig], num_steps: int, mesh: Mesh) -> list[CoordinateRecord]:
    """The records of every proxy, in order."""
    records, flops = [], [flops_per_token(found.model, 0, causal=False) for found in configs]
    with ProgressReporter(f"coordinates at tp {mesh.tp_size}", sum(flops), enabled=mesh.rank == 0) as progress:
        for found, work in zip(configs, flops, strict=True):
            records += measure_proxy(found, num_steps, mesh)
            progress.advance(work, f"width {found.model.hidden_size}, {found.run.precision}, seed {found.run.seed}")
    return records


def measure_proxy(config: TrainConfig, num_steps: int, mesh: Mesh) -> list[CoordinateRecord]:
    """The records of one proxy: at the start and after each of `num_steps` updates."""
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
    """Every coordinate of the batch in fp32; of the scores, those of this rank's heads."""
    assert isinstance(model, Decoder)
    captured: dict[str, Tensor] = {}
    tokens, documents = (part[:, :MAX_ROW_TOKENS].to(mesh.device) for part in (batch.tokens, batch.document_ids))
    with _capture_coordinates(model, captured):
        logits = model.logits(tokens, documents)
    if model.head is None:
        logits.scatter_(-1, tokens.unsqueeze(-1), 0.0)
    return {name: value.float() for name, value in captured.items()} | {"logits": logits}


def judge(records: list[CoordinateRecord]) -> list[Measurement]:
    """The slope of every coordinate's log size and log change against log width, by case, beside what its law allows."""
    cases = dict.fromkeys((record["tp_size"], record["precision"]) for record in records)
    last_step = max(record["step"] for record in records)
    names = sorted(records[0]["size"], key=lambda name: list(EXPECTED_EXPONENTS).index(name.split()[0]))
    measurements = []
    for kind, step in (("size", 0), ("change", last_step)):
        for name in names:
            coordinate = name.split()[0]
            size, least, greatest = EXPECTED_EXPONENTS[coordinate]
            low, high = (size, size) if kind == "size" else (least, greatest)
            for tp_size, precision in cases:
                widths, values = coordinate_curve(records, tp_size, precision, kind, name, step)
                measurements.append(Measurement(
                    "coordinates", f"{kind} of {name}", f"tp {tp_size} {precision}", fit_exponent(widths, values),
                    low - EXPONENT_TOLERANCE, high + EXPONENT_TOLERANCE, LIKELY_CAUSES[kind, coordinate],
                ))  # fmt: skip
    return measurements


def coordinate_curve(
    records: list[CoordinateRecord], tp_size: int, precision: str, kind: str, name: str, step: int
) -> tuple[list[int], list[float]]:
    """Widths and the coordinate's size or change after `step` updates at each, root mean square over seeds."""
    squares: dict[int, list[float]] = {}
    for record in records:
        if (record["tp_size"], record["precision"], record["step"]) == (tp_size, precision, step):
            squares.setdefault(record["width"], []).append(record[kind][name] ** 2)
    return list(squares), [sqrt(sum(values) / len(values)) for values in squares.values()]


def fit_exponent(widths: list[int], values: list[float]) -> float:
    """Exponent of the width in the values, by least squares; not a number where a value is 0, as of what never changed."""
    if min(values) <= 0:
        return nan
    x = [log(width) for width in widths]
    y = [log(value) for value in values]
    middle = sum(x) / len(x)
    return sum((a - middle) * b for a, b in zip(x, y, strict=True)) / sum((a - middle) ** 2 for a in x)


def _build_record(
    config: TrainConfig, step: int, current: dict[str, Tensor], start: dict[str, Tensor], mesh: Mesh
) -> CoordinateRecord:
    squares = [float(value.square().mean()) for value in current.values()]
    squares += [float((current[name] - start[name]).square().mean()) for name in current]
    # Ranks hold the same coordinates, or equally many heads' scores.
    means = [sqrt(square / mesh.world_size) for square in sum_over_ranks(squares)]
    return {
        "tp_size": mesh.tp_size, "precision": config.run.precision, "width": config.model.hidden_size,
        "seed": config.run.seed, "step": step,
        "size": dict(zip(current, means, strict=False)),
        "change": dict(zip(current, means[len(current) :], strict=True)),
    }  # fmt: skip


@contextmanager
def _capture_coordinates(model: Decoder, captured: dict[str, Tensor]) -> Iterator[None]:
    """Within the block a forward pass leaves its coordinates in `captured`."""

    def stream(name: str) -> Callable[..., None]:
        return lambda module, inputs, output: captured.update({name: output})

    def branch(name: str, bias: Tensor | None) -> Callable[..., None]:
        return lambda module, inputs, partial: captured.update({name: _full_branch_output(partial, bias)})

    handles = [model.layers[0].register_forward_pre_hook(lambda module, inputs: captured.update(embedding=inputs[0]))]
    for index, layer in enumerate(cast(Iterable[Any], model.layers)):
        handles += [
            layer.attention.register_forward_hook(branch(f"attention {index}", layer.attention.out.bias)),
            layer.ffn.register_forward_hook(branch(f"ffn {index}", layer.ffn.down.bias)),
            layer.register_forward_hook(stream(f"stream {index}")),
        ]
    # The family calls the kernel by this name; only there are norms and rotation applied.
    family = sys.modules[type(model).__module__]
    kernel = family.attention
    family.attention = _capture_scores(kernel, captured)  # type: ignore[attr-defined]
    try:
        yield
    finally:
        family.attention = kernel  # type: ignore[attr-defined]
        for handle in handles:
            handle.remove()


def _full_branch_output(partial: Tensor, bias: Tensor | None) -> Tensor:
    """The branch's contribution to the stream from this rank's partial sum."""
    summed = reduce_from_tp(partial.clone())  # the reduction is in place, and the model still needs its partial sum
    return summed if bias is None else summed + bias


def _capture_scores(kernel: Callable[..., Tensor], captured: dict[str, Tensor]) -> Callable[..., Tensor]:
    """The kernel, which leaves in `captured` what its scores do: the mix less that of queries of zero, per size of a
    head's values.

    While scores are small this is in proportion to them. Unlike products of queries and keys it has passed the kernel itself,
    whatever that made of the scale it was given.
    """

    def attention(query: Tensor, key: Tensor, value: Tensor, **rest: Any) -> Tensor:
        # In fp32: the difference is small beside the rounding of a mix in bf16.
        wide = [each.float() for each in (query, key, value)]
        effect = kernel(*wide, **rest) - kernel(torch.zeros_like(wide[0]), *wide[1:], **rest)
        index = sum(name.startswith("scores") for name in captured)
        of_value_heads = wide[2].square().mean((0, 1, 3)).sqrt()
        captured[f"scores {index}"] = effect / of_value_heads.repeat_interleave(query.shape[2] // key.shape[2])[:, None]
        return kernel(query, key, value, **rest)

    return attention
