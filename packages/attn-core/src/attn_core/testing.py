"""What a test of an operator needs: the tolerance table, the comparison, and seeded cases of every operator.

Public, so that packages built on attn-core judge their own operators by the same table.
"""

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from . import attention, block_attention, halo_index, linear, window_index
from .dispatch import Backend

# dtype → largest error of an output relative to max(1, max|reference|); gradients may have twice that. The reference
# runs in float64 on the rounded inputs.
TOLERANCE = {torch.float64: 1e-10, torch.float32: 2e-5, torch.float16: 3e-3, torch.bfloat16: 2e-2}


def relative_error(actual: Tensor, reference: Tensor) -> float:
    """max|actual − reference| / max(1, max|reference|) in float64; equal infinities agree, NaN is an infinite error."""
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
        build: dtype, device → (positional arguments, keyword arguments); floating tensors are leaves with a gradient.
    """

    operator: Callable[..., Any]
    name: str
    build: Callable[[torch.dtype, str], tuple[list[Any], dict[str, Any]]] = field(repr=False)

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
    result = case.operator(*args, **kwargs, backend=backend)
    return result if isinstance(result, tuple) else (result,)


def gradients(outputs: tuple[Tensor, ...], inputs: list[Tensor], seed: int = 1) -> list[Tensor]:
    """Gradients of a random weighting of all outputs; −inf entries (lse of dead rows) weigh nothing."""
    generator = torch.Generator().manual_seed(seed)
    loss = torch.zeros((), dtype=torch.float64, device=outputs[0].device)
    for output in outputs:
        weight = torch.randn(output.shape, generator=generator, dtype=torch.float64).to(output.device)
        loss = loss + (output.double() * weight).masked_fill(output == -math.inf, 0.0).sum()
    if not loss.requires_grad:
        return [torch.zeros_like(tensor) for tensor in inputs]
    grads = torch.autograd.grad(loss, inputs, allow_unused=True)
    return [torch.zeros_like(t) if g is None else g for g, t in zip(grads, inputs, strict=True)]


def assert_matches_reference(
    case: Case, dtype: torch.dtype, backend: Backend | None = None, device: str = "cpu", factor: float = 1.0
) -> None:
    """Outputs and all gradients of ``backend`` against the reference in float64 on the same rounded inputs.

    Args:
        factor: on the table's tolerance, 1 unless the caller states a reason.

    Raises:
        AssertionError: names the tensor, its error and the bound.
    """
    args, kwargs = case.inputs(dtype, device)
    outputs = run(case, args, kwargs, backend)
    inputs = leaves(args, kwargs)
    wide_args, wide_kwargs = _widened(args), dict(zip(kwargs, _widened(list(kwargs.values())), strict=True))
    expected = run(case, wide_args, wide_kwargs, "reference")
    bound = TOLERANCE[dtype] * factor
    for i, (actual, reference) in enumerate(zip(outputs, expected, strict=True)):
        error = relative_error(actual, reference)
        if not error <= bound:
            raise AssertionError(f"{case}: output {i} is off by {error:.2e}, allowed {bound:.0e} in {dtype}")
    expected_grads = gradients(expected, leaves(wide_args, wide_kwargs))
    for i, (actual, reference) in enumerate(zip(gradients(outputs, inputs), expected_grads, strict=True)):
        error = relative_error(actual, reference)
        if not error <= 2 * bound:
            raise AssertionError(f"{case}: gradient {i} is off by {error:.2e}, allowed {2 * bound:.0e} in {dtype}")


def _widened(values: list[Any]) -> list[Any]:
    def widen(value: Any) -> Any:
        if isinstance(value, (list, tuple)):
            return [widen(item) for item in value]
        if isinstance(value, Tensor) and value.is_floating_point():
            return value.detach().double().requires_grad_(value.requires_grad)
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


# --- cases ------------------------------------------------------------------------------------------------------------


def tensor(dtype: torch.dtype, device: str, *shape: int, gradient: bool = True) -> Tensor:
    """Standard normal numbers."""
    return torch.randn(*shape, dtype=torch.float64).to(device=device, dtype=dtype).requires_grad_(gradient)


def _attention_case(
    name: str,
    *,
    batch: int = 2,
    heads: int = 4,
    key_heads: int = 2,
    queries: int = 7,
    keys: int = 12,
    width: int = 8,
    value_width: int = 8,
    bias: tuple[int, int, int, int] | None = None,
    grid: tuple[int, ...] = (),
    mask: bool = False,
    strided: bool = False,
    **options: Any,
) -> Case:
    def build(dtype: torch.dtype, device: str) -> tuple[list[Any], dict[str, Any]]:
        def data(heads: int, tokens: int, width: int) -> Tensor:
            if strided:  # heads split from a wide projection, every second column
                wide = tensor(dtype, device, batch, tokens, heads, 2 * width, gradient=False)
                return wide[..., ::2].transpose(1, 2).requires_grad_()
            return tensor(dtype, device, batch, heads, tokens, width)

        kwargs = dict(options)
        if bias is not None:
            kwargs["bias"] = tensor(dtype, device, *bias)
        if grid:
            leading = [(batch, 1), (1, heads), (batch, heads)]
            kwargs["axis_bias"] = [
                tensor(dtype, device, *leading[axis % 3], queries, size) for axis, size in enumerate(grid)
            ]
        if mask:
            visible = torch.rand(batch, keys) > 0.4
            visible[0] = False
            kwargs["key_mask"] = visible.to(device)
        return [data(heads, queries, width), data(key_heads, keys, width), data(key_heads, keys, value_width)], kwargs

    return Case(attention, name, build)


def attention_cases() -> list[Case]:
    case = _attention_case
    return [
        case("plain"),
        case("wide value", value_width=11),
        case("narrow value", value_width=3),
        case("width 1", width=1, value_width=1),
        case("odd width", width=20, value_width=20),
        case("one query", queries=1),
        case("one key", keys=1),
        case("prime lengths", queries=31, keys=37),
        case("no scale", scale=0.0),
        case("strided", strided=True),
        case("causal upper left", causal="upper_left"),
        case("causal lower right, more keys", causal="lower_right"),
        case("causal lower right, more queries", queries=17, causal="lower_right"),
        case("dense bias", bias=(2, 4, 7, 12)),
        case("bias of keys", bias=(2, 1, 1, 12), causal="lower_right"),
        case("bias of heads", bias=(1, 4, 1, 1)),
        case("axis bias", grid=(3, 4)),
        case("three axes", grid=(2, 3, 2), causal="upper_left"),
        case("axis bias wider than the head", grid=(1, 12), width=2),
        case("key mask with a dead image", mask=True),
        case("everything", mask=True, bias=(1, 4, 7, 12), grid=(4, 3), causal="lower_right", value_width=5),
        case("no image", batch=0),
        case("no query", queries=0),
        case("no key", keys=0),
    ]


def _block_case(
    name: str,
    *,
    batch: int = 2,
    heads: int = 4,
    key_heads: int = 2,
    side: int = 6,
    width: int = 8,
    value_width: int = 8,
    window: int = 2,
    halo: int = 0,
    table: tuple[int, int, int] | None = None,
    holes: bool = False,
    weight: tuple[int, int] | None = None,
    grid: bool = False,
    clusters: int = 0,
    positions: bool = False,
    strided: bool = False,
    **options: Any,
) -> Case:
    def build(dtype: torch.dtype, device: str) -> tuple[list[Any], dict[str, Any]]:
        tokens = side * side

        def data(heads: int, width: int) -> Tensor:
            if strided:
                wide = tensor(dtype, device, batch, tokens, 3, heads, width, gradient=False)
                return wide[:, :, 1].transpose(1, 2).requires_grad_()
            return tensor(dtype, device, batch, heads, tokens, width)

        kwargs = dict(options)
        if clusters:
            q_index = torch.randint(-1 if holes else 0, max(1, tokens), (batch, heads, clusters, 5))
            kv_index = torch.randint(-1 if holes else 0, max(1, tokens), (batch, key_heads, clusters, 7))
        else:
            q_index = window_index(side, side, (window, window))
            kv_index = halo_index(side, side, (window, window), (halo, halo))
        blocks = q_index.shape[2]
        args = [data(heads, width), data(key_heads, width), data(key_heads, value_width)]
        args += [q_index.to(device), kv_index.to(device)]
        slots = 1
        if table is not None:
            slots = table[2]
            listed = torch.randint(-1 if holes else 0, blocks, (table[0], table[1], blocks, slots))
            if holes:
                listed[:, :, 0] = -1
            args.append(listed.to(device))
        if weight is not None:
            kwargs["kv_weight"] = tensor(dtype, device, *weight, blocks, slots)
        if grid:
            span = window + 2 * halo
            kwargs["axis_bias"] = [
                tensor(dtype, device, batch, 1, tokens, span),
                tensor(dtype, device, 1, heads, tokens, span),
            ]
        if positions:
            kwargs["q_pos"] = torch.randint(0, tokens, (batch, tokens)).to(device)
            kwargs["k_pos"] = torch.randint(-1, tokens, (1, tokens)).to(device)
        return args, kwargs

    return Case(block_attention, name, build)


def block_attention_cases() -> list[Case]:
    case = _block_case
    return [
        case("windows"),
        case("windows that leave the map", side=5, window=3),
        case("wide value", value_width=11),
        case("odd width", width=20, value_width=3),
        case("width 1", width=1, value_width=1),
        case("strided", strided=True, table=(2, 1, 2)),
        case("halo", halo=1),
        case("halo with axis bias", halo=1, grid=True),
        case("routed", table=(2, 1, 3)),
        case("routed, one table for all images", table=(1, 1, 2)),
        case("routed with holes and a dead region", table=(2, 1, 3), holes=True),
        case("routed to most regions", table=(2, 1, 8)),
        case("routed per head", table=(2, 4, 2)),
        case("soft routing", table=(2, 1, 3), weight=(2, 1)),
        case("soft routing per head", table=(2, 1, 2), weight=(1, 4)),
        case("routed halo with axis bias", halo=1, table=(2, 1, 2), grid=True),
        case("everything per head", halo=1, table=(1, 4, 2), grid=True, weight=(2, 4), causal=True, holes=True),
        case("causal", table=(2, 1, 3), causal=True),
        case("positions", table=(2, 1, 3), causal=True, positions=True),
        case("self logit", self_logit=-3.0),
        case("clusters", clusters=4, reduce="mean", causal=True),
        case("clusters with holes", clusters=4, reduce="mean", holes=True, self_logit=-2.0),
        case("one token", side=1, window=1),
        case("no image", batch=0),
        case("no token", side=0),
    ]


def linear_cases() -> list[Case]:
    def case(name: str, *shape: int, out: int = 6, bias: bool = True, **options: Any) -> Case:
        def build(dtype: torch.dtype, device: str) -> tuple[list[Any], dict[str, Any]]:
            args = [tensor(dtype, device, *shape), tensor(dtype, device, out, shape[-1])]
            return [*args, tensor(dtype, device, out)] if bias else args, dict(options)

        return Case(linear, name, build)

    return [
        case("plain", 5, 7),
        case("no bias", 5, 7, bias=False),
        case("batch of maps", 2, 3, 4, 8),
        case("gelu", 3, 5, 7, activation="gelu"),
        case("wide", 9, 130, out=140, activation="gelu"),
        case("one vector", 7),
        case("no row", 0, 7),
    ]


def every_case() -> list[Case]:
    """The cases of all operators; the contract tests run over them."""
    return [*attention_cases(), *block_attention_cases(), *linear_cases()]
