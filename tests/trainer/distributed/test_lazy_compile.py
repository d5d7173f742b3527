"""Functions that a library decorates with torch.compile on its import compile when they are called."""

import sys

import pytest
import torch

from tandem.trainer.distributed.lazy_compile import compile_at_first_call


def test_a_decorated_function_is_compiled_at_its_first_call(monkeypatch):
    compiled = []
    with monkeypatch.context() as patch:
        patch.setattr(
            torch, "compile", lambda function, **options: compiled.append((function.__name__, options)) or function
        )
        with compile_at_first_call():

            @torch.compile
            def add(left: int, right: int) -> int:
                """Its docstring."""
                return left + right

            @torch.compile(dynamic=True)
            def double(number: int) -> int:
                return 2 * number

        assert compiled == []
        assert [add(1, right=2), add(3, 4), double(5)] == [3, 7, 10]
        assert compiled == [("add", {}), ("double", {"dynamic": True})]
        assert (add.__name__, add.__doc__) == ("add", "Its docstring.")


def test_wandb_and_the_compiler_come_back(monkeypatch):
    monkeypatch.delitem(sys.modules, "wandb", raising=False)
    original = torch.compile
    with pytest.raises(ImportError), compile_at_first_call():
        import wandb  # noqa: F401
    assert (torch.compile, "wandb" in sys.modules) == (original, False)
