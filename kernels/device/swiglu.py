"""SwiGLU in units of 128 columns.

A unit is 128 neighbouring columns of one row: 256 bytes of bf16. Any ffn_hidden_size of whole units (54, 27 or 14 of them for
BTLM on 1, 2 and 4 ranks) leaves no idle thread and no ragged last block. Gate and up are read in place from the buffer with
both.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from tandem.kernels.device.launch import launch, num_blocks

UNIT_COLUMNS = 128
FORWARD_CONFIG = {"UNITS": 16, "num_warps": 4}
BACKWARD_CONFIG = {"UNITS": 8, "num_warps": 4}
"""Each thread has 16 bytes per tensor in flight, and 32 in forward, which reads fewer tensors."""


@triton.jit
def _unit_indices(row_units, UNITS: tl.constexpr, UNIT: tl.constexpr):
    """Return the row of each unit and the columns of its elements."""
    # Units are counted in 32 bits, because a 64-bit division costs three times as much. Only row offsets need 64.
    unit = tl.program_id(0) * UNITS + tl.arange(0, UNITS)
    row = unit // row_units
    column = (unit - row * row_units)[:, None] * UNIT + tl.arange(0, UNIT)[None, :]
    return row.to(tl.int64), column


@triton.jit
def _forward(gate, up, out, rows, columns, row_units, row_stride, UNITS: tl.constexpr, UNIT: tl.constexpr):
    row, column = _unit_indices(row_units, UNITS, UNIT)
    exists = (row < rows)[:, None] & (column < columns)
    source = row[:, None] * row_stride + column
    g = tl.load(gate + source, mask=exists, other=0.0).to(tl.float32)
    u = tl.load(up + source, mask=exists, other=0.0).to(tl.float32)
    tl.store(out + row[:, None] * columns + column, (g * tl.sigmoid(g) * u).to(out.dtype.element_ty), mask=exists)


@triton.jit
def _backward(
    out_gradient, gate, up, gate_gradient, up_gradient, product,
    rows, columns, row_units, row_stride,
    WITH_PRODUCT: tl.constexpr, UNITS: tl.constexpr, UNIT: tl.constexpr,
):  # fmt: skip
    row, column = _unit_indices(row_units, UNITS, UNIT)
    exists = (row < rows)[:, None] & (column < columns)
    source = row[:, None] * row_stride + column
    narrow = row[:, None] * columns + column
    dy = tl.load(out_gradient + narrow, mask=exists, other=0.0).to(tl.float32)
    g = tl.load(gate + source, mask=exists, other=0.0).to(tl.float32)
    u = tl.load(up + source, mask=exists, other=0.0).to(tl.float32)
    sigmoid = tl.sigmoid(g)
    silu = g * sigmoid
    wide = row[:, None] * (2 * columns) + column
    dtype = gate_gradient.dtype.element_ty
    tl.store(gate_gradient + wide, (dy * u * sigmoid * (1 + g * (1 - sigmoid))).to(dtype), mask=exists)
    tl.store(up_gradient + wide, (dy * silu).to(dtype), mask=exists)
    if WITH_PRODUCT:
        tl.store(product + narrow, (silu * u).to(dtype), mask=exists)


def forward(gate_up: Tensor, gate_index: int) -> Tensor:
    """Return silu(gate) * up, contiguous."""
    halves, out = _flatten_gate_up(gate_up), _empty_output(gate_up)
    sizes = _layout(halves)
    programs = (num_blocks(sizes[0] * sizes[2], FORWARD_CONFIG["UNITS"]),)
    gate, up = halves[:, gate_index], halves[:, 1 - gate_index]
    launch(_forward, programs, gate, up, out, *sizes, UNIT=UNIT_COLUMNS, **FORWARD_CONFIG)
    return out


def backward(out_gradient: Tensor, gate_up: Tensor, gate_index: int, *, with_product: bool) -> tuple[Tensor, Tensor]:
    """Return the gradient of gate_up, contiguous, and the forward result if `with_product`, else an empty tensor."""
    halves = _flatten_gate_up(gate_up)
    gradient = torch.empty(gate_up.shape, dtype=gate_up.dtype, device=gate_up.device)
    product = _empty_output(gate_up) if with_product else gate_up.new_empty(0)
    wide, sizes = gradient.view(halves.shape), _layout(halves)
    programs = (num_blocks(sizes[0] * sizes[2], BACKWARD_CONFIG["UNITS"]),)
    gate, up, gate_gradient, up_gradient = (x[:, i] for x in (halves, wide) for i in (gate_index, 1 - gate_index))
    launch(
        _backward, programs, out_gradient.contiguous(), gate, up, gate_gradient, up_gradient, product, *sizes,
        WITH_PRODUCT=with_product, UNIT=UNIT_COLUMNS, **BACKWARD_CONFIG,
    )  # fmt: skip
    return gradient, product


def _flatten_gate_up(gate_up: Tensor) -> Tensor:
    """Reshape to [rows, 2, columns] with contiguous columns; a view if the leading dims can be joined into one."""
    halves = gate_up.reshape(-1, 2, gate_up.shape[-1])
    return halves if halves.stride(-1) == 1 else halves.contiguous()


def _empty_output(gate_up: Tensor) -> Tensor:
    return gate_up.new_empty(gate_up.shape[:-2] + gate_up.shape[-1:])


def _layout(halves: Tensor) -> tuple[int, int, int, int]:
    """Return rows, columns, units in a row, and the stride of rows."""
    rows, _, columns = halves.shape
    assert rows * num_blocks(columns, UNIT_COLUMNS) < 2**31
    return rows, columns, num_blocks(columns, UNIT_COLUMNS), halves.stride(0)
