"""Choice of the backend: argument > use_backend > environment > automatic, and the reasons that explain() gives."""

import os
import subprocess
import sys

import pytest
import torch

import attn_core
from attn_core import attention, dispatch, explain, use_backend


@pytest.fixture
def q() -> torch.Tensor:
    return torch.randn(1, 2, 4, 8)


def test_automatic_choice_on_a_cpu_is_torch(q: torch.Tensor) -> None:
    report = explain(attention, q, q, q)
    assert report["torch"] == "chosen automatically"
    assert report["reference"] == "never chosen automatically"
    assert "need a GPU" in report["triton"]


def test_argument_beats_context_and_context_beats_environment(q: torch.Tensor, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dispatch, "_environment", "reference")
    assert explain("attention", q, q, q)["reference"] == "chosen by ATTN_CORE_BACKEND"
    with use_backend("torch"):
        assert explain("attention", q, q, q)["torch"] == "chosen by use_backend"
        assert explain("attention", q, q, q, backend="reference")["reference"] == "chosen by the backend argument"
    assert explain("attention", q, q, q)["reference"] == "chosen by ATTN_CORE_BACKEND"


def test_the_named_backend_really_runs(q: torch.Tensor, monkeypatch: pytest.MonkeyPatch) -> None:
    import attn_core.ops.attention as package

    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("reached")

    monkeypatch.setattr(package, "reference", refuse)
    attention(q, q, q)
    with use_backend("reference"), pytest.raises(AssertionError, match="reached"):
        attention(q, q, q)
    with pytest.raises(AssertionError, match="reached"):
        attention(q, q, q, backend="reference")


def test_the_context_ends_with_an_exception(q: torch.Tensor) -> None:
    with pytest.raises(ZeroDivisionError), use_backend("reference"):
        _ = 1 / 0
    assert explain("attention", q, q, q)["torch"] == "chosen automatically"


@pytest.mark.skipif(dispatch.interpreting(), reason="the interpreter runs kernels on CPU tensors")
def test_a_requested_backend_that_cannot_run_says_why(q: torch.Tensor) -> None:
    with pytest.raises(RuntimeError, match="attention: backend='triton' cannot run: Triton kernels need a GPU"):
        attention(q, q, q, backend="triton")
    with pytest.raises(RuntimeError, match=r"take float32, bfloat16 and float16, not torch\.float64"):
        attention(q.double(), q.double(), q.double(), backend="triton")
    assert "cannot run" in explain("attention", q, q, q, backend="triton")["triton"]


def test_an_unknown_backend_is_named(q: torch.Tensor) -> None:
    with pytest.raises(
        ValueError, match="attention: backend must be one of 'reference', 'torch', 'triton', got backend='cuda'"
    ):
        attention(q, q, q, backend="cuda")  # pyright: ignore[reportArgumentType]
    with pytest.raises(ValueError, match="use_backend: backend must be one of"), use_backend("fast"):  # pyright: ignore[reportArgumentType]
        pass


def test_the_environment_variable_is_read_at_import() -> None:
    """One process for both: ``nonsense`` must end the first import there, ``reference`` must serve the second."""
    code = """
import os, torch
try:
    import attn_core
except ValueError as error:
    print(error)
os.environ["ATTN_CORE_BACKEND"] = "reference"
import attn_core as a
os.environ["ATTN_CORE_BACKEND"] = "torch"
q = torch.zeros(1, 1, 2, 2)
print(a.explain("attention", q, q, q))
"""
    environment = {**os.environ, "ATTN_CORE_BACKEND": "nonsense"}
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, encoding="utf-8", check=False
    )
    assert done.returncode == 0, done.stderr
    refused, explained = done.stdout.splitlines()
    assert refused.startswith("ATTN_CORE_BACKEND: backend must be one of")
    assert "'reference': 'chosen by ATTN_CORE_BACKEND'" in explained


@pytest.mark.compile
def test_a_compiled_function_follows_use_backend(q: torch.Tensor) -> None:
    torch.compiler.reset()
    compiled = torch.compile(lambda q: attention(q, q, q)[0], fullgraph=True, backend="eager")
    expected = compiled(q)
    with use_backend("reference"):
        torch.testing.assert_close(compiled(q), expected)
    assert attn_core.attention is attention


def test_explain_takes_lists_of_tensors(q: torch.Tensor) -> None:
    assert explain("merge_attention", [q, q], [q[..., 0], q[..., 0]])["torch"] == "chosen automatically"
