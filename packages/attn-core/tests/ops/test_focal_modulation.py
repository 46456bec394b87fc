"""focal_modulation: the equation by loops, timm's module, its properties, and every message."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from attn_core import focal_modulation
from attn_core.ops.focal_modulation import torch_backend
from attn_core.testing import TOLERANCE, Case, cases_of, gradients, leaves, relative_error


def by_loops(ctx: Tensor, gates: Tensor, weights: list[Tensor], normalize: bool = False) -> Tensor:
    """One tap at a time."""
    _, _, H, W = ctx.shape
    z, y = ctx, torch.zeros_like(ctx)

    def gelu(u: Tensor) -> Tensor:
        return u * 0.5 * torch.erfc(-u / math.sqrt(2))

    for level, weight in enumerate(weights):
        radius, u = weight.shape[-1] // 2, torch.zeros_like(z)
        for row in range(H):
            for column in range(W):
                for dy in range(-radius, radius + 1):
                    for dx in range(-radius, radius + 1):
                        if 0 <= row + dy < H and 0 <= column + dx < W:
                            tap = weight[:, 0, dy + radius, dx + radius]
                            u[:, :, row, column] += tap * z[:, :, row + dy, column + dx]
        z = gelu(u)
        y = y + z * gates[:, level, None]
    y = y + gelu(z.mean((2, 3), keepdim=True)) * gates[:, -1, None]
    return y / (len(weights) + 1) if normalize else y


@pytest.mark.parametrize(
    "case", [c for c in cases_of("focal_modulation") if c.name not in ("no pixel", "prime sizes")], ids=str
)
def test_reference_equals_the_equation_by_loops(case: Case) -> None:
    args, kwargs = case.inputs(torch.float64)
    with torch.no_grad():
        actual = focal_modulation(*args, **kwargs, backend="reference")
        assert relative_error(actual, by_loops(*args, **kwargs)) <= TOLERANCE[torch.float64]


@pytest.mark.parametrize("normalize", [False, True])
def test_equals_timms_focalnet_module(normalize: bool) -> None:
    focalnet = pytest.importorskip("timm.models.focalnet")
    module = focalnet.FocalModulation(8, focal_window=3, focal_level=3, normalize_modulator=normalize).double()
    x = torch.randn(2, 8, 9, 11, dtype=torch.float64)
    q, ctx, gates = module.f(x).split(module.input_split, 1)
    modulator = focal_modulation(ctx, gates, [layer[0].weight for layer in module.focal_layers], normalize=normalize)
    assert relative_error(module.proj(q * module.h(modulator)), module(x)) <= 1e-12


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def problem(batch: int, height: int, width: int) -> tuple[Tensor, Tensor, list[Tensor]]:
    ctx, gates = random(batch, 3, height, width), random(batch, 3, height, width, seed=1)
    return ctx, gates, [random(3, 1, k, k, seed=k) / k for k in (3, 5)]


sizes = st.integers(1, 12)


@settings(deadline=None, max_examples=20)
@given(height=sizes, width=sizes, axes=st.sampled_from([(2,), (3,), (2, 3)]))
def test_a_mirrored_map_with_mirrored_kernels_gives_the_mirrored_result(
    height: int, width: int, axes: tuple[int, ...]
) -> None:
    ctx, gates, weights = problem(2, height, width)
    expected = focal_modulation(ctx, gates, weights).flip(axes)
    actual = focal_modulation(ctx.flip(axes), gates.flip(axes), [weight.flip(axes) for weight in weights])
    assert relative_error(actual, expected) <= 1e-10


@settings(deadline=None, max_examples=20)
@given(height=sizes, width=sizes, seed=st.integers(0, 1000))
def test_permuting_the_channels_permutes_the_result(height: int, width: int, seed: int) -> None:
    ctx, gates, weights = problem(1, height, width)
    order = torch.randperm(3, generator=torch.Generator().manual_seed(seed))
    expected = focal_modulation(ctx, gates, weights)[:, order]
    assert relative_error(focal_modulation(ctx[:, order], gates, [w[order] for w in weights]), expected) <= 1e-10


def test_without_the_mean_only_the_neighborhood_matters() -> None:
    ctx, gates, weights = problem(1, 12, 12)
    gates[:, -1] = 0
    far = ctx.clone()
    far[:, :, 6, 6] += 5
    changed = (focal_modulation(far, gates, weights) != focal_modulation(ctx, gates, weights)).any(1)[0]
    rows, columns = changed.nonzero(as_tuple=True)
    assert (int(rows.min()), int(rows.max())) == (3, 9)  # radii 1 + 2
    assert (int(columns.min()), int(columns.max())) == (3, 9)


def test_a_batch_equals_its_images_one_by_one(monkeypatch: pytest.MonkeyPatch) -> None:
    ctx, gates, weights = problem(5, 6, 7)

    def step(ctx: Tensor, gates: Tensor) -> list[Tensor]:
        args = [ctx.clone().requires_grad_(), gates, [w.clone().requires_grad_() for w in weights]]
        y = focal_modulation(*args)
        return [y, *torch.autograd.grad(y.sin().sum(), leaves(args, {}))]

    whole = step(ctx, gates)
    monkeypatch.setattr(torch_backend, "CHUNK", 2 * 3 * 6 * 7)
    for actual, expected in zip(step(ctx, gates), whole, strict=True):
        assert relative_error(actual, expected) <= 1e-12
    pieces = torch.cat([step(ctx[i : i + 1], gates[i : i + 1])[0] for i in range(5)])
    assert relative_error(pieces, whole[0]) <= 1e-12


@pytest.mark.parametrize("kernel", [5, 7, 9, 11])
def test_gradients_of_large_kernels_by_blocks_are_those_of_autograd(kernel: int) -> None:
    args = [torch.randn(2, 4, 9, 13), torch.randn(2, 2, 9, 13), [torch.randn(4, 1, kernel, kernel) / kernel]]
    args[2][0].requires_grad_()
    inputs = leaves(args, {})
    (actual,), (expected,) = (
        gradients((focal_modulation(*args, backend=backend),), inputs) for backend in ("torch", "reference")
    )
    assert relative_error(actual, expected) <= 2 * TOLERANCE[torch.float32]


def test_result_and_gradient_are_channels_last() -> None:
    projection = torch.randn(2, 6, 7, 11, requires_grad=True)
    ctx, gates = projection.permute(0, 3, 1, 2).split((8, 3), 1)
    y = focal_modulation(ctx, gates, [torch.randn(8, 1, 3, 3), torch.randn(8, 1, 5, 5)])
    assert y.is_contiguous(memory_format=torch.channels_last)
    (dctx,) = torch.autograd.grad(y.sum(), ctx)
    assert dctx.is_contiguous(memory_format=torch.channels_last)


def test_vmap_over_kernels_gives_each_entry_its_own() -> None:
    ctx, gates, weights = problem(2, 6, 7)
    many = torch.stack([weights[0], 2 * weights[0], -weights[0]])

    def loss(weight: Tensor) -> Tensor:
        return focal_modulation(ctx, gates, [weight, weights[1]]).sin().sum()

    looped = torch.stack([torch.func.grad(loss)(weight) for weight in many])
    assert relative_error(torch.func.vmap(torch.func.grad(loss))(many), looped) <= 1e-10


def make(**replaced: object) -> dict[str, object]:
    weights = [torch.zeros(4, 1, 3, 3), torch.zeros(4, 1, 5, 5)]
    return {"ctx": torch.zeros(2, 4, 6, 8), "gates": torch.zeros(2, 3, 6, 8), "weights": weights, **replaced}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"ctx": torch.zeros(4, 6, 8)},
            r"focal_modulation: ctx must have 4 dimensions \(B C Y X\), got shape \(4, 6, 8\)",
        ),
        ({"ctx": torch.zeros(2, 4, 6, 8).long()}, "ctx must be one of float64, float32, bfloat16, float16"),
        ({"gates": torch.zeros(3, 6, 8)}, r"gates must have 4 dimensions \(B L Y X\)"),
        ({"gates": torch.zeros(1, 3, 6, 8)}, r"gates must have size 2 along dimension 0 \(the batch of ctx\)"),
        ({"gates": torch.zeros(2, 2, 6, 8)}, r"gates must have size 3 along dimension 1 \(one for each of weights and"),
        ({"gates": torch.zeros(2, 3, 5, 8)}, r"gates must have size 6 along dimension 2 \(the rows of ctx\)"),
        ({"gates": torch.zeros(2, 3, 6, 7)}, r"gates must have size 8 along dimension 3 \(the columns of ctx\)"),
        ({"gates": torch.zeros(2, 3, 6, 8).half()}, r"gates must have the dtype of ctx \(torch.float32\)"),
        ({"weights": [torch.zeros(4, 3, 3)] * 2}, r"weights\[0\] must have 4 dimensions \(C 1 k k\)"),
        ({"weights": [torch.zeros(5, 1, 3, 3)] * 2}, r"weights\[0\] must have size 4 along dimension 0 \(the channels"),
        ({"weights": [torch.zeros(4, 4, 3, 3)] * 2}, r"weights\[0\] must have size 1 along dimension 1 \(a depthwise"),
        ({"weights": [torch.zeros(4, 1, 4, 4)] * 2}, r"weights\[0\] must be a square kernel of odd size, got shape"),
        ({"weights": [torch.zeros(4, 1, 3, 5)] * 2}, r"weights\[0\] must be a square kernel of odd size, got shape"),
        (
            {"weights": [torch.zeros(4, 1, 3, 3, device="meta")] * 2},
            r"weights\[0\] must be on the device of ctx \(cpu\), got weights\[0\] on meta",
        ),
    ],
    ids=lambda value: value[:40] if isinstance(value, str) else "",
)
def test_bad_arguments_are_named(changes: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        focal_modulation(**make(**changes))  # pyright: ignore[reportArgumentType]
