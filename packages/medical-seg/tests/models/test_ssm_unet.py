"""U-shaped networks of state-space blocks by name: sizes, the two networks of papers among them, one to three axes."""

from itertools import product
from typing import Any

import pytest
import torch
from torch import nn

from medical_seg.models import CATALOG, create_model, is_planar, load_official, window_divisor
from medical_seg.models.vm_unet import PatchExpand, PatchMerging

SMALL: dict[str, Any] = {"depths": (1, 1), "depths_up": (1, 1), "width": 8, "states": 2}


@pytest.mark.parametrize(
    ("block", "count"),
    [
        ("atrous", 27_424_514),
        ("bimamba", 24_706_946),
        ("multi_head", 17_254_082),
        ("s6", 23_302_850),
        ("ss2d", 27_424_514),
        ("ss3d", 27_424_514),
        ("ssd", 22_543_022),
        ("tri_oriented", 26_111_042),
        ("umamba", 82_714_082),
        ("windowed", 27_424_514),
    ],
)
def test_parameters_of_every_network(block: str, count: int) -> None:
    assert CATALOG.parameters(f"ssm_unet:{block}") == count


@pytest.mark.parametrize(("block", "paper"), [("ss2d", "vm_unet"), ("multi_head", "mhs_vm")])
def test_networks_of_papers_have_their_names_and_numbers(block: str, paper: str) -> None:
    torch.manual_seed(0)
    theirs = create_model(paper, in_channels=1, out_channels=2, **SMALL).eval()
    ours = create_model(f"ssm_unet:{block}", **SMALL).eval()
    ours.load_state_dict(theirs.state_dict())
    x = torch.randn(1, 1, 16, 8)
    torch.testing.assert_close(ours(x), theirs(x))


@pytest.mark.parametrize(("dims", "sides"), [(1, (16,)), (3, (8, 16, 8))])
def test_sequences_and_volumes_are_segmented(dims: int, sides: tuple[int, ...]) -> None:
    model = create_model("ssm_unet:ss3d", spatial_dims=dims, out_channels=3, **{**SMALL, "width": 4})
    found = model(torch.randn(1, 1, *sides))
    assert found.shape == (1, 3, *sides)
    found.square().mean().backward()
    assert all(p.grad is not None and torch.isfinite(p.grad).all() for p in model.parameters())


def test_patches_of_a_volume_merge_and_expand_place_by_place() -> None:
    x = torch.randn(1, 2, 4, 2, 3)
    merging = PatchMerging(3, 3)
    merging.norm = nn.Identity()  # type: ignore[assignment]
    corners = [(z, y, x) for x, y, z in product((0, 1), repeat=3)]
    token = torch.cat([x[0, z, 2 + y, c] for z, y, c in corners])
    torch.testing.assert_close(merging(x)[0, 0, 1, 0], merging.reduction(token))
    expand = PatchExpand(3, 2, 5, 3)
    expand.norm = nn.Identity()  # type: ignore[assignment]
    parts = expand.expand(x[0, 1, 3, 0]).view(2, 2, 2, 5)
    for place in product((0, 1), repeat=3):
        z, y, c = place
        torch.testing.assert_close(expand(x)[0, 2 + z, 6 + y, c], parts[place])


def test_options_reach_the_network_and_its_blocks() -> None:
    model: Any = create_model("ssm_unet:windowed", patch=2, block_options={"window": 3}, **SMALL)
    assert model.divisor == 4
    assert {m.window for m in model.modules() if hasattr(m, "window")} == {3}
    assert model(torch.zeros(1, 1, 8, 4)).shape == (1, 2, 8, 4)
    assert window_divisor("ssm_unet:s6", {"depths": (1, 1), "depths_up": (1, 1)}, planar=False) == 8
    assert [is_planar(f"ssm_unet:{name}") for name in ("ss2d", "multi_head", "s6", "tri_oriented")] == [1, 1, 0, 0]


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: create_model("ssm_unet:sd2d"), "create_model: unknown model 'ssm_unet:sd2d'; did you mean"),
        (lambda: create_model("ssm_unet:s6", block="s7"), "create_block: unknown block 's7'"),
        (lambda: create_model("ssm_unet:s6", block_options={"kernal": 3}), "no option 'kernal'; did you mean 'kernel'"),
        (lambda: create_model("ssm_unet:ss2d", spatial_dims=3), "SS2D: spatial_dims must be one of 2, got 3"),
        (
            lambda: create_model("ssm_unet:s6", spatial_dims=4),
            "SSMUNet: spatial_dims must be 1, 2 or 3 and patch at least",
        ),
        (lambda: create_model("ssm_unet:s6", width=9, patch=2), "SSMUNet: width=9 must be a multiple of 2"),
        (
            lambda: create_model("ssm_unet:s6", spatial_dims=3, **SMALL)(torch.zeros(1, 1, 8, 8)),
            r"SSMUNet: expected \(B C Z Y X\), got shape \(1, 1, 8, 8\)",
        ),
        (
            lambda: create_model("ssm_unet:s6", spatial_dims=3, **SMALL)(torch.zeros(1, 1, 8, 9, 8)),
            "SSMUNet: image 8×9×8 is not divisible by 8; pad to 8×16×8",
        ),
        (
            lambda: load_official(create_model("ssm_unet:s6", **SMALL), {}),
            "no official weights are known for a SSMUNet",
        ),
    ],
)
def test_mistakes_are_named(make: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()
