"""Boundary matching by gathering beside the published mask, written out sample by sample."""

import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from detection.bench import boundary_matching as bench
from detection.models.bmn.matching import BoundaryMatching, plan_matching, sample_positions


def published(layer: BoundaryMatching, x: Tensor, mask: Tensor) -> Tensor:
    """The published layer: samples of all pairs, then a convolution over their bins → (B, O, start, end)."""
    samples = torch.einsum("bct,tnse->bcnse", x, mask)
    weight = layer.weight.permute(1, 2, 0)[..., None, None]
    return F.conv3d(samples, weight, layer.bias, stride=(len(layer.weight), 1, 1)).squeeze(2)


@pytest.mark.parametrize(
    ("steps", "bins", "per_bin", "ratio", "longest"), [(9, 4, 3, 0.5, None), (7, 3, 1, 0.0, 4), (5, 1, 2, 1.3, None)]
)
def test_gathering_equals_the_dense_mask_in_output_and_gradients(
    steps: int, bins: int, per_bin: int, ratio: float, longest: int | None, mask_of_samples: Callable[..., Tensor]
) -> None:
    torch.manual_seed(0)
    layer = BoundaryMatching(5, 6, steps, bins=bins, per_bin=per_bin, ratio=ratio, longest=longest).double()
    mask = mask_of_samples(steps, bins, per_bin, ratio)
    plan = layer.plan(torch.float64, torch.device("cpu"))
    assert len(plan.start) == sum(min(steps - start, longest or steps) for start in range(steps))
    found = []
    x = torch.randn(2, 5, steps, dtype=torch.float64, requires_grad=True)
    for out in (layer(x), published(layer, x, mask)[:, :, plan.start, plan.end].mT):
        found.append((out, *torch.autograd.grad((out**3).sum(), (x, layer.weight, layer.bias))))
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-10)
    samples = torch.einsum("bct,tnp->bcnp", x, mask[:, :, plan.start, plan.end])
    torch.testing.assert_close(layer.sample(x), samples, rtol=1e-10, atol=1e-10)
    assert torch.autograd.gradcheck(layer, (x[:1],))
    assert torch.autograd.gradgradcheck(lambda t: layer(t) ** 2, (x[:1, :, :],))


def test_the_gather_is_that_of_the_mask_in_float32(mask_of_samples: Callable[..., Tensor]) -> None:
    layer = BoundaryMatching(8, 4, 40, bins=8)
    dense = bench.DenseMatching(layer)
    plan = layer.plan(torch.float32, torch.device("cpu"))
    x = torch.randn(2, 8, 40)
    assert (layer(x) - dense(x)[:, :, plan.start, plan.end].mT).abs().max() <= 1e-6
    torch.testing.assert_close(
        dense.mask.view(40, 8, 40, 40)[:, :, 3, 20], mask_of_samples(40, 8, 3, 0.5)[:, :, 3, 20].float()
    )


class Largest(TorchDispatchMode):
    """Bytes of the largest tensor that any operation gives."""

    bytes = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for one in out if isinstance(out, tuple | list) else [out]:
            if isinstance(one, Tensor):
                self.bytes = max(self.bytes, one.untyped_storage().nbytes())
        return out


def test_nothing_of_the_size_of_the_mask_or_of_the_samples_is_made() -> None:
    steps, bins, channels = 60, 16, 8
    layer = BoundaryMatching(channels, 8, steps, bins=bins)
    plan_matching.cache_clear()
    layer.plan(torch.float32, torch.device("cpu"))
    with Largest() as seen:
        layer(torch.randn(1, channels, steps, requires_grad=True)).sum().backward()
    assert seen.bytes <= 4 * steps * bins * steps**2 / 20  # the mask alone
    plan = layer.plan(torch.float32, torch.device("cpu"))
    held = sum(t.numel() * t.element_size() for bags in (plan.pairs, plan.steps) for t in bags)
    assert held <= 4 * steps * bins * steps**2 / 8  # a sixteenth at the published size
    assert not dict(layer.named_buffers())


@pytest.mark.slow
def test_a_training_step_holds_a_twentieth_of_what_the_dense_mask_holds() -> None:
    found = {row["formulation"]: int(str(row["peak MiB"])) for row in bench.benchmark(1, "cpu", channels=16, out=8)}
    assert found["gather"] <= found["dense mask"] / 20, found


def test_samples_lie_evenly_over_the_widened_pair() -> None:
    places = sample_positions(3, 2, 2, 0.5)
    assert places[0].tolist() == pytest.approx([-1, 0, 1, 2])
    assert places[2].tolist() == pytest.approx([-2, 1 / 3, 8 / 3, 5])


def test_half_precision_is_summed_in_float32_and_a_batch_may_be_empty() -> None:
    torch.manual_seed(0)
    layer = BoundaryMatching(4, 3, 6, bins=4)
    x = torch.randn(2, 4, 6)
    expected = layer(x)
    with torch.autocast("cpu", torch.bfloat16):
        found = layer(x)
    assert found.dtype == torch.bfloat16
    torch.testing.assert_close(found.float(), expected, rtol=2e-2, atol=2e-2)
    torch.testing.assert_close(layer.bfloat16()(x.bfloat16()).float(), expected, rtol=2e-2, atol=3e-2)
    assert layer(x[:0].bfloat16()).shape == (0, 21, 3)


def test_what_is_compiled_computes_the_same() -> None:
    layer = BoundaryMatching(4, 3, 6, bins=4)
    x = torch.randn(2, 4, 6)
    exported = torch.export.export(layer, (x,), strict=False).module()
    torch.testing.assert_close(exported(x), layer(x), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"steps": 0}, "steps must be at least 1, got steps=0"),
        ({"bins": 0}, "bins must be at least 1, got bins=0"),
        ({"per_bin": -1}, "per_bin must be at least 1, got per_bin=-1"),
        ({"ratio": -0.5}, "ratio must be at least 0, got ratio=-0.5"),
        ({"longest": 7}, "longest must be 1…6, the steps, got longest=7"),
    ],
)
def test_sizes_that_do_not_fit_are_named(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        BoundaryMatching(4, 3, **{"steps": 6, **options})


def test_features_of_another_shape_are_named() -> None:
    with pytest.raises(ValueError, match=re.escape("features must be (B, 4, 6), got (2, 4, 5)")):
        BoundaryMatching(4, 3, 6)(torch.zeros(2, 4, 5))
