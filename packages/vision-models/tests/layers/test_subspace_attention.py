"""ULSAM against a loop over groups with layers written out, the official module's names among them."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vision_models.layers.subspace_attention import ULSAM, from_official


def normed(x: Tensor, module: Any, part: slice, training: bool) -> Tensor:
    """Batch norm of some channels with the batch's statistics or the kept ones."""
    mean, variance = module.running_mean[part], module.running_var[part]
    if training:
        mean, variance = x.mean((0, 2, 3)), x.var((0, 2, 3), correction=0)
    x = (x - mean[:, None, None]) / (variance[:, None, None] + 1e-5).sqrt()
    return x * module.weight[part][:, None, None] + module.bias[part][:, None, None]


def plain(module: Any, x: Tensor, training: bool) -> Tensor:
    width = x.shape[1] // module.num_groups
    outs = []
    for g in range(module.num_groups):
        part, own = slice(g * width, (g + 1) * width), slice(g, g + 1)
        group = x[:, part]
        h = group * module.conv_dws.weight[part, 0] + module.conv_dws.bias[part][:, None, None]
        h = normed(h, module.bn_dws, part, training).clamp(min=0)
        windows = F.pad(h, (1, 1, 1, 1), value=-torch.inf).unfold(2, 3, 1).unfold(3, 3, 1)
        h = (windows.amax((-1, -2)) * module.conv_point.weight[g]).sum(1, keepdim=True) + module.conv_point.bias[g]
        h = normed(h, module.bn_point, own, training).clamp(min=0).exp()
        weights = h / h.sum((2, 3), keepdim=True)
        if module.scale == "area":
            weights = weights / weights.mean((2, 3), keepdim=True)
        outs.append(group + group * weights)
    return torch.cat(outs, 1)


def module_of(dim: int, groups: int, **options: Any) -> Any:
    module: Any = ULSAM(dim, groups, **options).double()
    for tensor in (*module.parameters(), module.bn_dws.running_mean, module.bn_point.running_mean):
        nn.init.normal_(tensor)
    for norm in (module.bn_dws, module.bn_point):
        nn.init.uniform_(norm.running_var, 0.5, 2.0)
    return module


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize(("dim", "groups", "scale"), [(16, 4, "one"), (12, 1, "one"), (12, 6, "area")])
def test_output_and_gradients_equal_the_loop_over_groups(dim: int, groups: int, scale: Any, training: bool) -> None:
    module = module_of(dim, groups, scale=scale).train(training)
    x = torch.randn(3, dim, 5, 4, dtype=torch.float64, requires_grad=True)
    expected = plain(module, x, training)
    out = module(x)
    weight, leaves = torch.randn_like(out), [x, *module.parameters()]
    torch.testing.assert_close(out, expected, rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(
        torch.autograd.grad((out * weight).sum(), leaves),
        torch.autograd.grad((expected * weight).sum(), leaves),
        rtol=1e-8,
        atol=1e-10,
    )


def test_running_statistics_follow_the_last_batch_by_nine_tenths() -> None:
    module: Any = ULSAM(8, 2)
    x = torch.randn(4, 8, 3, 3)
    with torch.no_grad():
        h = module.conv_dws(x)
    module(x)
    torch.testing.assert_close(module.bn_dws.running_mean, 0.9 * h.mean((0, 2, 3)))


@pytest.mark.parametrize(("dim", "groups", "count"), [(64, 4, 332), (16, 1, 83), (16, 4, 92), (24, 8, 144)])
def test_parameters_are_as_measured_with_the_official_module(dim: int, groups: int, count: int) -> None:
    assert sum(p.numel() for p in ULSAM(dim, groups).parameters()) == count
    width = dim // groups
    assert count == groups * (2 * width + 2 * width + (width + 1) + 2)


def test_official_weights_of_each_group_stand_side_by_side() -> None:
    ours = module_of(12, 3).state_dict()
    official: dict[str, Tensor] = {}
    for name, value in ours.items():
        parts = [value] * 3 if value.ndim == 0 else value.chunk(3)
        official |= {f"subspaces.{g}.{name}": part for g, part in enumerate(parts)}
    loaded = from_official(official)
    assert loaded.keys() == ours.keys()
    assert all(torch.equal(loaded[name], value) for name, value in ours.items())
    with pytest.raises(ValueError, match=r"stands in groups \[0, 2\], not in all from 0 on"):
        from_official({n: v for n, v in official.items() if ".1." not in n})
    with pytest.raises(ValueError, match=r"expected subspaces.<group>.<layer>.<name>, got 'conv.weight'"):
        from_official({"conv.weight": torch.zeros(1)})


def test_what_does_not_fit_is_named() -> None:
    with pytest.raises(ValueError, match="ULSAM: num_groups must divide dim=16, got num_groups=3"):
        ULSAM(16, 3)
    with pytest.raises(ValueError, match="ULSAM: scale must be 'one' or 'area', got scale='two'"):
        ULSAM(16, scale="two")  # type: ignore[arg-type]
