"""Every operation is fully registered with torch: schema, fakes, autograd, and the same bits compiled and recomputed."""

import pkgutil
from importlib import import_module
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._library.custom_ops import OPDEFS
from torch.utils.checkpoint import checkpoint

import tandem.kernels
from tandem.kernels.attention import alibi_slopes

for module in pkgutil.iter_modules(tandem.kernels.__path__, "tandem.kernels."):
    if not module.ispkg:
        import_module(module.name)

GATE_UP, FFN = (2, 3, 2, 5), (2, 3, 5)
QKV, NORMS, HEADS = (5, 2, 64), [(4, 8), (2, 8)], [(2, 5, 4, 8), (2, 5, 2, 8), (2, 5, 2, 8)]
ANGLES = (torch.arange(5.0)[:, None] / torch.arange(1, 3))[None]
TABLE = [ANGLES.cos(), ANGLES.sin()]
TARGETS = torch.tensor([7, 0, 8, -2])
"""For four tokens: the last of eight columns, the first, and one past each end."""
BLOCK = {"first": 0, "columns": 8, "scale": 0.7}
BIASED = [0.25, alibi_slopes(4), torch.tensor([[0, 0, 2, 2, 2], [0, 0, 0, 3, 4]], dtype=torch.int32)]

FORWARD = {
    "swiglu": [GATE_UP, 1],
    "swiglu_linear": [GATE_UP, (4, 5), 0],
    "split_and_rotate_qkv": [QKV, *TABLE, *NORMS, 1e-5, 8, 2],
    "split_and_rotate_qkv, no norms": [QKV, *TABLE, None, None, 0.0, 8, 2],
    "attention": [*HEADS, *BIASED],
    "attention, few queries": [(2, 2, 4, 8), *HEADS[1:], 0.25, None, None],
    "cross_entropy": [(4, 9), TARGETS, 8, 0.7],
    "linear_cross_entropy": [(4, 3), (130, 3), TARGETS, 129, 0.7],
}
INSIDE = {
    "swiglu_backward": [FFN, GATE_UP, 1, True],
    "swiglu_backward, no product": [FFN, GATE_UP, 0, False],
    "split_and_rotate_qkv_backward": [*HEADS, QKV, *TABLE, *NORMS, 1e-5],
    "split_and_rotate_qkv_backward, no norms": [*HEADS, None, *TABLE, None, None, 0.0],
    "attention_backward": [HEADS[0], *HEADS, HEADS[0], (2, 4, 5), *BIASED],
    "cross_entropy_add": [(4, 9), TARGETS, (3, 4), BLOCK],
    "cross_entropy_gradient": [(4, 9), TARGETS, (4,), (4,), (4,), BLOCK],
    "linear_cross_entropy_backward": [(4, 3), (130, 3), TARGETS, (3, 4), (3, 4), 129, 0.7],
}
"""Arguments of every operation; a shape is replaced by random numbers. Operations called inside others have no gradient."""
LAYOUTS = {
    "packed": lambda x: x,
    "transposed": lambda x: x.transpose(0, -1).contiguous().transpose(0, -1),
}
ALL = pytest.mark.parametrize("name", FORWARD | INSIDE)
LAID_OUT = pytest.mark.parametrize("layout", LAYOUTS)


def operation(name: str) -> Any:
    return getattr(torch.ops.tandem, name.split(",")[0]).default


def tensors_of(results: Tensor | tuple[Tensor, ...] | None) -> tuple[Tensor, ...]:
    if results is None:  # an operation on a block, which writes to it
        return ()
    return results if isinstance(results, tuple) else (results,)


def example(name: str, layout: str, generator: torch.Generator) -> tuple[list[Any], dict[str, Any]]:
    arguments = (FORWARD | INSIDE)[name]
    keywords = BLOCK if BLOCK in arguments else {}

    def laid_out(argument: Any) -> Any:
        if not isinstance(argument, tuple):
            return argument
        return LAYOUTS[layout](torch.randn(argument, generator=generator)).requires_grad_(name in FORWARD)

    return [laid_out(argument) for argument in arguments if argument is not keywords], keywords


@LAID_OUT
@ALL
def test_its_registration_holds_what_it_says(name, layout, generator):
    """opcheck: schema, mutated arguments, autograd, fake results down to their strides, and tracing by a compiler."""
    torch.library.opcheck(operation(name), *example(name, layout, generator))


@LAID_OUT
@ALL
def test_results_on_meta_have_the_shape_dtype_and_strides_of_those_with_data(name, layout, generator):
    arguments, keywords = example(name, layout, generator)
    with_data, without = (
        operation(name)(*(x.detach().to(device) if torch.is_tensor(x) else x for x in arguments), **keywords)
        for device in ("cpu", "meta")
    )
    for found, known in zip(tensors_of(with_data), tensors_of(without), strict=True):
        assert (known.shape, known.dtype, known.stride()) == (found.shape, found.dtype, found.stride())


@pytest.mark.parametrize("name", FORWARD)
def test_compiled_and_recomputed_it_has_the_same_bits(name, generator):
    """Calls the operation directly, because a compiler cannot follow the annotation checks of tests."""
    arguments, _ = example(name, "packed", generator)
    leaves = [x for x in arguments if torch.is_tensor(x) and x.requires_grad]

    def result(*arguments: Any) -> Tensor:
        # Pass computed tensors, as a model does: an operation may overwrite its input.
        given = [2 * x if torch.is_tensor(x) and x.requires_grad else x for x in arguments]
        return sum(x.square().sum() for x in tensors_of(operation(name)(*given)) if x.requires_grad)

    ways = [
        result,
        torch.compile(result, backend="aot_eager", fullgraph=True, dynamic=False),
        lambda *arguments: checkpoint(result, *arguments, use_reentrant=False),
    ]
    plain, *others = ([x, *torch.autograd.grad(x, leaves)] for x in (way(*arguments) for way in ways))
    for other in others:
        assert all(torch.equal(a, b) for a, b in zip(plain, other, strict=True))


def test_no_operation_is_left_out():
    ours = {name.removeprefix("tandem::") for name in OPDEFS if name.startswith("tandem::")}
    assert ours == {name.split(",")[0] for name in FORWARD | INSIDE}
