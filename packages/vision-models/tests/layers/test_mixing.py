"""Agent and InLine attention in their four hosts: published sizes, checkpoints, image sizes."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from attn_core.weights import official_names
from vision_models import CSwin, DeiT, Swin, create_model, list_models, load_official
from vision_models.layers.mixing import fit_table, image_grid, kinds_of_blocks

PARAMETERS = {
    "agent_deit_tiny": 6_015_640,
    "agent_deit_small": 22_647_112,
    "agent_deit_small_448": 23_070_472,
    "agent_deit_base": 87_204_904,
    "agent_pvt_tiny": 11_570_352,
    "agent_pvt_small": 20_635_066,
    "agent_pvt_medium": 35_921_746,
    "agent_pvt_medium_256": 36_083_682,
    "agent_pvt_large": 48_738_180,
    "agent_swin_tiny": 28_902_964,
    "agent_swin_small": 49_666_684,
    "agent_swin_small_288": 49_707_964,
    "agent_swin_base": 88_095_096,
    "agent_swin_base_384": 88_305_016,
    "agent_cswin_tiny": 20_458_672,
    "agent_cswin_small": 32_814_100,
    "agent_cswin_base": 73_249_696,
    "agent_cswin_base_384": 73_328_416,
    "inline_deit_tiny": 6_477_736,
    "inline_deit_small": 16_734_760,
    "inline_deit_base": 23_797_096,
    "inline_pvt_tiny": 12_032_232,
    "inline_pvt_small": 21_556_136,
    "inline_pvt_medium": 37_618_856,
    "inline_pvt_large": 51_154_280,
    "inline_swin_tiny": 29_223_544,
    "inline_swin_small": 49_793_296,
    "inline_swin_base": 88_350_120,
    "inline_swin_base_384": 88_465_320,
    "inline_cswin_tiny": 20_604_520,
    "inline_cswin_small": 33_032_872,
    "inline_cswin_base": 73_413_640,
    "inline_cswin_base_384": 73_413_640,
}
# 10⁹ multiply-adds of the official code, counted there with fvcore
HOSTS = ("deit", "pvt", "swin", "cswin")
SMALL = [f"test_{kind}_{host}" for kind in ("agent", "inline") for host in HOSTS]


def test_every_model_of_the_hosts_is_counted() -> None:
    ours = {name for name in list_models() if name.startswith(("agent_", "inline_"))}
    assert ours == set(PARAMETERS)


@pytest.mark.parametrize("name", PARAMETERS)
def test_parameter_counts_are_those_of_the_official_code(name: str) -> None:
    assert sum(p.numel() for p in create_model(name, device="meta").parameters()) == PARAMETERS[name]


@pytest.mark.parametrize("name", SMALL)
def test_official_checkpoints_make_the_round_trip(name: str) -> None:
    model, other = create_model(name), create_model(name)
    (layout,) = model.key_map
    model_state = model.state_dict()
    state = {key: model_state[ours] for key, ours in official_names(model, model.key_map[layout]).items()}
    if "swin" in name and "cswin" not in name:  # buffers of the official file that we compute
        state["layers.3.blocks.1.attn.relative_position_index"] = torch.zeros(9, 9)
        state["layers.2.blocks.1.attn_mask"] = torch.zeros(4, 9, 9)
    load_official(other, {"model": state})
    assert all(torch.equal(value, model_state[key]) for key, value in other.state_dict().items())


@pytest.mark.parametrize(
    ("name", "published"),
    [
        ("test_agent_deit", ["cls_token", "blocks.0.attn.ac_bias", "blocks.3.attn.qkv.weight", "head.bias"]),
        ("test_inline_deit", ["pos_embed", "blocks.2.attn.residual.2.weight", "blocks.0.mlp.fc1.bias"]),
        (
            "test_agent_pvt",
            ["pos_embed1", "patch_embed3.norm.bias", "block2.0.attn.dwc.weight", "block4.0.attn.kv.bias"],
        ),
        ("test_inline_pvt", ["pos_embed4", "block1.0.attn.sr.weight", "block3.0.attn.residual.0.bias"]),
        ("test_agent_swin", ["layers.1.downsample.reduction.weight", "layers.0.blocks.0.attn.ha_bias", "norm.weight"]),
        ("test_inline_swin", ["patch_embed.proj.bias", "layers.3.blocks.1.attn.relative_position_bias_table"]),
        ("test_agent_cswin", ["stage1_conv_embed.2.weight", "merge3.conv.bias", "stage1.0.attns.0.get_v.weight"]),
        (
            "test_inline_cswin",
            ["stage2.0.attns.0.residual.0.weight", "stage3.1.attns.1.get_v.bias", "stage4.0.qkv.bias"],
        ),
    ],
)
def test_official_names_look_as_published(name: str, published: list[str]) -> None:
    model = create_model(name, device="meta")
    (layout,) = model.key_map
    assert set(published) <= official_names(model, model.key_map[layout]).keys()


@pytest.mark.parametrize("name", SMALL)
def test_checkpoint_of_another_image_size_computes_what_its_model_does_there(name: str) -> None:
    """Agent biases stretch alike at loading and in the forward pass; embeddings do so in DeiT alone."""
    options: dict[str, Any] = {"window": 2} if name.endswith("_swin") else {}
    small, large = (create_model(name, img_size=size, **options).double().eval() for size in (64, 96))
    load_official(large, small.state_dict())
    if "pvt" in name:
        large_state = large.state_dict()
        for key, value in small.state_dict().items():
            if key.endswith("pos_embed"):
                value.zero_()
                large_state[key].zero_()
    x = torch.randn(2, 3, 96, 96, dtype=torch.float64)
    with torch.no_grad():
        torch.testing.assert_close(large(x), small(x), rtol=1e-9, atol=1e-11)


def test_tables_of_windows_and_positions_are_stretched_bicubically() -> None:
    model = Swin((1,), 12, (3,), attention="softmax", img_size=64, agents=(1,))
    name = "stages.0.blocks.0.attn.relative_position_bias_table"
    table = torch.randn(9**2, 3)
    expected = F.interpolate(table.T.view(1, 3, 9, 9), size=(13, 13), mode="bicubic").flatten(2)[0].T
    torch.testing.assert_close(fit_table(model, name, table), expected)
    deit = DeiT(1, 8, 2, img_size=(64, 96))
    positions = torch.randn(1, 1 + 9, 8)
    cells = F.interpolate(positions[:, 1:].mT.reshape(1, 8, 3, 3), size=(4, 6), mode="bicubic").flatten(2).mT
    torch.testing.assert_close(fit_table(deit, "pos_embed", positions), torch.cat([positions[:, :1], cells], 1))


def test_tables_that_differ_in_more_than_the_image_do_not_fit() -> None:
    state = create_model("test_agent_deit").state_dict()
    with pytest.raises(ValueError, match=r"load_official: .*blocks.0.attn.mixing.an_bias is \(4, 49, 7, 7\)"):
        load_official(create_model("test_agent_deit", agents=4), state)
    state["pos_embed"] = torch.randn(1, 1 + 10, 48)
    with pytest.raises(ValueError, match=r"pos_embed is \(1, 11, 48\), the model has \(1, 37, 48\)"):
        load_official(create_model("test_agent_deit"), state)


@pytest.mark.parametrize("name", SMALL)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_trains_with_finite_gradients(name: str, dtype: torch.dtype) -> None:
    model = create_model(name, dtype=dtype)
    model(torch.randn(2, 3, 64, 64, dtype=dtype)).float().square().mean().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())


def test_kinds_are_given_for_all_blocks_or_stages_or_each() -> None:
    assert kinds_of_blocks("Swin", "agent", (1, 2)) == [["agent"], ["agent", "agent"]]
    assert kinds_of_blocks("Swin", ("inline", ("agent", "softmax")), (2, 2)) == [
        ["inline", "inline"],
        ["agent", "softmax"],
    ]
    model = CSwin((1, 2), 8, (2, 2), attention=("softmax", ("inline", "agent")), agents=(1, 4), split=(2,))
    kinds = [type(block.attns[0]).__name__ for stage in model.stages for block in stage.blocks]  # pyright: ignore[reportGeneralTypeIssues]
    assert kinds == ["StripeAttention", "InLineMixing", "AgentMixing"]


@pytest.mark.parametrize(
    ("attention", "message"),
    [
        (("agent",), "attention must be one kind or have one entry for each of 2 stages"),
        ("agnet", "attention must be 'agent', 'inline' or 'softmax', got 'agnet'"),
        (("agent", ("agent", "softmax", "softmax")), "attention of a stage must name its 2 blocks, got 3"),
    ],
)
def test_wrong_kinds_are_named(attention: Any, message: str) -> None:
    with pytest.raises(ValueError, match=f"Swin: {message}"):
        kinds_of_blocks("Swin", attention, (1, 2))


def test_wrong_image_size_is_named() -> None:
    with pytest.raises(ValueError, match=r"PVT: img_size must be positive, got img_size=\(224, 0\)"):
        image_grid("PVT", (224, 0))


@pytest.mark.parametrize("name", SMALL)
def test_images_of_a_batch_do_not_see_each_other(name: str) -> None:
    model = create_model(name).double().eval()
    x: Tensor = torch.randn(3, 3, 65, 97, dtype=torch.float64)
    with torch.no_grad():
        torch.testing.assert_close(model(x)[1:2], model(x[1:2]), rtol=1e-9, atol=1e-11)
