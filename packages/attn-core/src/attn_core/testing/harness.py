"""The tolerance table and the comparison of an operator with its float64 reference."""

import inspect
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from attn_core.dispatch import Backend, use_backend

# dtype → largest error of an output relative to max(1, max|reference|); gradients may have twice that. The reference
# runs in float64 on the rounded inputs.
TOLERANCE = {torch.float64: 1e-10, torch.float32: 2e-5, torch.float16: 3e-3, torch.bfloat16: 2e-2}


def relative_error(actual: Tensor, reference: Tensor) -> float:
    """max|actual − reference| / max(1, max|reference|) in float64; equal infinities agree, NaN is an infinite error."""
    actual, reference = (torch.view_as_real(x) if x.is_complex() else x for x in (actual, reference))
    actual, reference = actual.detach().double(), reference.detach().double()
    if actual.shape != reference.shape:
        raise AssertionError(f"shape {tuple(actual.shape)} against {tuple(reference.shape)}")
    if actual.numel() == 0:
        return 0.0
    same = actual == reference
    difference = (actual - reference).masked_fill(same, 0.0).abs()
    if difference.isnan().any():
        return math.inf
    finite = reference[reference.isfinite()].abs()
    size = float(finite.max()) if finite.numel() else 0.0
    return float(difference.max()) / max(1.0, size)


@dataclass(frozen=True)
class Case:
    """One seeded call of an operator.

    Attributes:
        varied: stands for its kind of argument in the slow tests (second derivatives, tracing).
        build: dtype, device → (positional arguments, keyword arguments); floating tensors are leaves with a gradient.
    """

    operator: Callable[..., Any]
    name: str
    build: Callable[[torch.dtype, str], tuple[list[Any], dict[str, Any]]] = field(repr=False)
    varied: bool = False

    def __str__(self) -> str:
        return f"{self.operator.__name__}-{self.name}"

    def inputs(self, dtype: torch.dtype, device: str = "cpu", seed: int = 0) -> tuple[list[Any], dict[str, Any]]:
        """The arguments; random numbers are drawn on the CPU in float64, so every dtype and device rounds the same."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            return self.build(dtype, device)


def leaves(args: list[Any], kwargs: dict[str, Any]) -> list[Tensor]:
    """The differentiable tensors among the arguments, lists and tuples included, in order."""
    flat: list[Any] = []
    for value in (*args, *kwargs.values()):
        flat.extend(value if isinstance(value, (list, tuple)) else [value])
    return [value for value in flat if isinstance(value, Tensor) and value.requires_grad]


def run(case: Case, args: list[Any], kwargs: dict[str, Any], backend: Backend | None = None) -> tuple[Tensor, ...]:
    """Outputs as a tuple."""
    if backend is None or "backend" in inspect.signature(case.operator).parameters:
        return _as_tuple(case.operator(*args, **kwargs, **({} if backend is None else {"backend": backend})))
    with use_backend(backend):  # a composite
        return _as_tuple(case.operator(*args, **kwargs))


def _as_tuple(result: Any) -> tuple[Tensor, ...]:
    return result if isinstance(result, tuple) else (result,)


def gradients(outputs: tuple[Tensor, ...], inputs: list[Tensor], seed: int = 1) -> list[Tensor]:
    """Gradients of a random weighting of all outputs; −inf entries (lse of dead rows) weigh nothing."""
    generator = torch.Generator().manual_seed(seed)
    loss = torch.zeros((), dtype=torch.float64, device=outputs[0].device)
    for output in (torch.view_as_real(x) if x.is_complex() else x for x in outputs):
        weight = torch.randn(output.shape, generator=generator, dtype=torch.float64).to(output.device)
        loss = loss + (output.double() * weight).masked_fill(output == -math.inf, 0.0).sum()
    if not loss.requires_grad:
        return [torch.zeros_like(tensor) for tensor in inputs]
    grads = torch.autograd.grad(loss, inputs, allow_unused=True)
    return [torch.zeros_like(t) if g is None else g for g, t in zip(grads, inputs, strict=True)]


def assert_matches_reference(
    case: Case,
    dtype: torch.dtype,
    backend: Backend | None = None,
    device: str = "cpu",
    factor: float = 1.0,
    definition: Callable[..., Any] | None = None,
) -> None:
    """Outputs and all gradients of ``backend`` against the reference in float64 on the same rounded inputs.

    Args:
        factor: on the table's tolerance, 1 unless the caller states a reason.
        definition: what stands for the reference backend, for example one of ``attn_core.testing.DEFINITIONS``.

    Raises:
        AssertionError: names the tensor, its error and the bound.
    """
    bound = TOLERANCE[dtype] * factor
    for name, error in errors(case, dtype, backend, device, definition):
        allowed = bound if name.startswith("output") else 2 * bound
        if not error <= allowed:
            raise AssertionError(f"{case}: {name} is off by {error:.2e}, allowed {allowed:.0e} in {dtype}")


def errors(
    case: Case,
    dtype: torch.dtype,
    backend: Backend | None = None,
    device: str = "cpu",
    definition: Callable[..., Any] | None = None,
) -> Iterator[tuple[str, float]]:
    """Relative errors of all outputs and gradients, by name, as :func:`assert_matches_reference` judges them."""
    args, kwargs = case.inputs(dtype, device)
    outputs = run(case, args, kwargs, backend)
    inputs = leaves(args, kwargs)
    wide_args, wide_kwargs = _widened(args), dict(zip(kwargs, _widened(list(kwargs.values())), strict=True))
    if definition is None:
        expected = run(case, wide_args, wide_kwargs, "reference")
    else:
        expected = _as_tuple(definition(*wide_args, **wide_kwargs))
    for i, (actual, reference) in enumerate(zip(outputs, expected, strict=True)):
        yield f"output {i}", relative_error(actual, reference)
    expected_grads = gradients(expected, leaves(wide_args, wide_kwargs))
    for i, (actual, reference) in enumerate(zip(gradients(outputs, inputs), expected_grads, strict=True)):
        yield f"gradient {i}", relative_error(actual, reference)


def _widened(values: list[Any]) -> list[Any]:
    def widen(value: Any) -> Any:
        if isinstance(value, (list, tuple)):
            return type(value)(widen(item) for item in value)
        if isinstance(value, Tensor) and value.is_floating_point():
            return value.detach().double().requires_grad_(value.requires_grad)
        if isinstance(value, Tensor) and value.is_complex():
            return value.detach().to(torch.complex128).requires_grad_(value.requires_grad)
        return value

    return [widen(value) for value in values]


@contextmanager
def poisoned_memory() -> Iterator[None]:
    """Every ``torch.empty`` holds NaN, and torch allows deterministic algorithms alone."""
    deterministic = torch.are_deterministic_algorithms_enabled()
    settings: Any = torch.utils.deterministic
    fill = settings.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True)
    settings.fill_uninitialized_memory = True
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(deterministic)
        settings.fill_uninitialized_memory = fill


def peak_memory(function: Callable[[], Any]) -> int:
    """Largest number of bytes that ``function`` held on the CPU beyond what was there before, by allocator events."""
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        function()
    held = peak = 0
    recorded: Any = profiler.profiler
    for event in recorded.kineto_results.events():
        if event.name() == "[memory]":
            held += event.nbytes()
            peak = max(peak, held)
    return peak


def restrided(x: Any) -> Any:
    """The same tensor, or list of tensors, in memory of its own order: dimensions reversed, every second entry.

    What lies between is NaN in floats and far away in indices, so that a reader of other strides shows.
    """
    if isinstance(x, (list, tuple)):
        return type(x)(restrided(item) for item in x)
    if not isinstance(x, Tensor) or x.ndim == 0:
        return x
    wide = x.new_zeros([2 * size + 1 for size in reversed(x.shape)])
    wide.fill_(math.nan if x.is_floating_point() else True if x.dtype == torch.bool else 2**20)
    view = wide[(slice(1, None, 2),) * x.ndim].permute(*reversed(range(x.ndim)))
    return view.copy_(x.detach()).requires_grad_(x.requires_grad)


def tensor(dtype: torch.dtype, device: str, *shape: int, gradient: bool = True) -> Tensor:
    """Standard normal numbers."""
    return torch.randn(*shape, dtype=torch.float64).to(device=device, dtype=dtype).requires_grad_(gradient)
