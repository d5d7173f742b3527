"""Rivals on the meta device, where Triton compiles and nothing runs. Needs a process in which Triton does not interpret."""

import json
import sys

import torch

from tandem.kernels.bench.compare import seeded_example
from tests.rivals.kernels.offline_compile import compile_for_sm90
from tests.rivals.kernels.operation import Rival
from tests.rivals.kernels.ops import OPERATIONS


def print_rival_shapes() -> None:
    """Print a line for each rival named in the arguments, after a number of tokens, at each operation that has it.

    The losses are left out: their rivals read values on the host, and Triton's interpreter can run them.
    """
    tokens, *names = sys.argv[1:]
    for op in OPERATIONS.values():
        for rival in op.rivals if "cross_entropy" not in op.name else ():
            if rival.name in names:
                print(json.dumps({"op": op.name, "rival": rival.name, **_rival_shapes(op, rival, int(tokens))}))


def _rival_shapes(op, rival: Rival, tokens: int) -> dict:
    """Shapes of results and gradients, as found and as expected, and the number of compiled kernels."""
    shape = op.shapes[0].with_tokens(tokens)
    example = seeded_example(rival.make_example or op.make_example, shape, torch.device("cpu"))
    inputs = [x.detach().to("meta").requires_grad_(x.requires_grad) for x in example.inputs]
    with compile_for_sm90() as compiled:
        outputs = rival.make_function(shape)(*inputs)
        outputs = outputs if isinstance(outputs, tuple) else (outputs,)
        gradients = [torch.empty_like(x, device="meta") for x in example.out_gradients]
        found = [*outputs, *torch.autograd.grad(outputs, [x for x in inputs if x.requires_grad], gradients)]
    expected = [*example.out_gradients, *example.inputs_with_grad]
    return {
        "found": [list(x.shape) for x in found],
        "expected": [list(x.shape) for x in expected],
        "kernels": len(compiled),
    }
