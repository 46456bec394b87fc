"""Rows of a result file: every provider of a case, its passes, its error against the float64 reference."""

import math
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from attn_core.testing import TOLERANCE

from .case import OWN, BenchCase, Call, Inputs, UnavailableError
from .timing import ROUNDS, in_turns, probe

PASSES = ("forward", "forward+backward")
Row = dict[str, Any]


def measure(
    operator: str,
    case: BenchCase,
    dtype: torch.dtype,
    device: str,
    *,
    seconds: float = 0.5,
    threads: int = 2,
    quick: bool = False,
) -> Iterator[Row]:
    """One row for each pass and provider; what could not run has ``ms`` None and says why in ``note``.

    Raises:
        Exception: one of our own backends failed. Peers' failures become notes.
    """
    inputs = drawn(case, dtype, device)
    weight, expected = _expected(case, inputs)
    for kind in PASSES:
        calls: dict[str, Callable[[], Any]] = {}
        rows: dict[str, Row] = {}
        for name, provider in case.providers.items():
            if name == "reference":
                continue
            row = rows[name] = _row(operator, case, dtype, kind, name, provider.remark)
            if quick and provider.compiles:
                row["note"] = "skipped: --quick compiles nothing"
                continue
            try:
                leaves = _leaves(inputs, gradient=kind != "forward")
                call = _pass(provider.prepare(leaves), leaves, weight, kind)
                memory, error = probe(call, device, memory=True, expected=expected[kind])
                row.update(mem_mb=_significant(memory), err_vs_f64=_significant(error))
            except (UnavailableError, NotImplementedError) as reason:
                row["note"] = _one_line(reason)
                continue
            except Exception as reason:
                if name in OWN:
                    raise
                row["note"] = _one_line(reason)
                continue
            calls[name] = call
        measured = in_turns(calls, device=device, rounds=1 if quick else ROUNDS, seconds=seconds, threads=threads)
        flops = case.flops * (1 if kind == "forward" else case.backward_factor)
        traffic = _traffic(inputs, expected["forward"][0].numel()) * (1 if kind == "forward" else 3)
        for name, timed in measured.items():
            rows[name].update(
                ms=_significant(timed.ms),
                p20=_significant(timed.p20),
                p80=_significant(timed.p80),
                tflops=_significant(flops / timed.ms / 1e9),
                gbs=_significant(traffic / timed.ms / 1e6),
            )
        yield from rows.values()
    if not quick and any(provider.compiles for provider in case.providers.values()):
        torch._dynamo.reset()  # the compiled peers of one case must not count against the next one's recompile limit


def wrong(row: Row) -> bool:
    """Whether one of our backends is less exact than the tolerance table allows."""
    factor = 1 if row["pass"] == "forward" else 2
    bound = factor * TOLERANCE[getattr(torch, row["dtype"])]
    return row["provider"] in OWN and row["err_vs_f64"] is not None and not row["err_vs_f64"] <= bound


def drawn(case: BenchCase, dtype: torch.dtype, device: str, seed: int = 0) -> Inputs:
    """The inputs of a case, rounded to ``dtype``."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        inputs = case.inputs()
    return {name: _cast(value, dtype, device) for name, value in inputs.items()}


def _cast(value: Any, dtype: torch.dtype, device: str) -> Any:
    if isinstance(value, tuple):
        return tuple(_cast(item, dtype, device) for item in value)
    if isinstance(value, Tensor):
        return value.to(device, dtype) if value.is_floating_point() else value.to(device)
    return value


def _leaves(inputs: Inputs, *, gradient: bool) -> Inputs:
    def leaf(value: Any) -> Any:
        if isinstance(value, tuple):
            return tuple(leaf(item) for item in value)
        if isinstance(value, Tensor) and value.is_floating_point():
            return value.detach().requires_grad_(gradient)
        return value

    return {name: leaf(value) for name, value in inputs.items()}


def _floating(inputs: Inputs) -> list[Tensor]:
    values = [item for value in inputs.values() for item in (value if isinstance(value, tuple) else (value,))]
    return [value for value in values if isinstance(value, Tensor) and value.is_floating_point()]


def _pass(call: Call, inputs: Inputs, weight: Tensor, kind: str) -> Callable[[], list[Tensor]]:
    if kind == "forward":

        @torch.no_grad()
        def forward() -> list[Tensor]:
            return [call()]

        return forward
    leaves = _floating(inputs)
    grad_out = weight.to(leaves[0].dtype)

    def forward_and_backward() -> list[Tensor]:
        return list(torch.autograd.grad(call(), leaves, grad_out))

    return forward_and_backward


def _expected(case: BenchCase, inputs: Inputs) -> tuple[Tensor, dict[str, list[Tensor]]]:
    """A random gradient of the output, and output and input gradients of the reference in float64."""
    wide = {name: _cast(value, torch.float64, "cpu") for name, value in inputs.items()}
    device = _floating(inputs)[0].device
    wide = _leaves({name: _cast(value, torch.float64, str(device)) for name, value in wide.items()}, gradient=True)
    out = case.providers["reference"].prepare(wide)()
    weight = torch.randn(out.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    weight = weight.to(_floating(inputs)[0].dtype).to(device)
    grads = torch.autograd.grad(out, _floating(wide), weight.double())
    return weight, {"forward": [out.detach()], "forward+backward": list(grads)}


def _traffic(inputs: Inputs, out_elements: int) -> int:
    """Bytes that any implementation reads and writes once."""
    values = [item for value in inputs.values() for item in (value if isinstance(value, tuple) else (value,))]
    tensors = [value for value in values if isinstance(value, Tensor)]
    size = _floating(inputs)[0].element_size()
    return sum(t.numel() * t.element_size() for t in tensors) + out_elements * size


def _row(operator: str, case: BenchCase, dtype: torch.dtype, kind: str, provider: str, remark: str | None) -> Row:
    return {
        "op": operator,
        "case": case.name,
        "length": case.length,
        "dtype": str(dtype).removeprefix("torch."),
        "pass": kind,
        "provider": provider,
        **dict.fromkeys(("ms", "p20", "p80", "mem_mb", "tflops", "gbs", "err_vs_f64")),
        "note": remark,
    }


def _significant(number: float | None) -> float | None:
    """Four significant digits: more would claim a precision that no timing has."""
    if number is None:
        return None
    return float(f"{number:.4g}") if math.isfinite(number) else number


def _one_line(reason: Exception) -> str:
    text = next((line.strip() for line in str(reason).splitlines() if line.strip()), "")
    name = "" if isinstance(reason, UnavailableError) else type(reason).__name__
    return ": ".join(part for part in (name, text) if part)[:160]
