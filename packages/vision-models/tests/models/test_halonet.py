"""HaloNet against timm's."""

from typing import Any

import pytest
import timm
import torch
from timm.layers.bottleneck_attn import BottleneckAttn
from timm.layers.halo_attn import HaloAttn
from timm.models.byobnet import ByoBlockCfg, ByobNet, ByoModelCfg, interleave_blocks
from torch import Tensor, nn

from attn_core.weights import official_names
from vision_models import HaloNet, create_model, load_official
from vision_models.layers import halo_attention
from vision_models.models.halonet import KEY_MAP, VARIANTS

PARAMETERS = {
    "halonet26t": 12_480_288,
    "halonet50ts": 22_733_280,
    "sehalonet33ts": 13_691_712,
    "eca_halonext26ts": 10_756_885,
    "haloregnetz_b": 11_680_072,
    "lamhalobotnet50ts_256": 22_569_824,
    "halo2botnet50ts_256": 22_635_360,
}
PAPER_MILLIONS = dict(
    zip((f"halonet_h{i}" for i in range(8)), (5.5, 8.1, 9.4, 11.8, 19.1, 30.7, 43.4, 67.4), strict=True)
)
TYPES = ("bottle", "self_attn")


def _redraw(net: nn.Module) -> None:
    for parameter in net.parameters():
        nn.init.normal_(parameter, std=0.1)
    for module in net.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.weight, 0.5, 1.5)
            module.running_mean.normal_(std=0.2)  # pyright: ignore[reportOptionalMemberAccess]
            module.running_var.uniform_(0.5, 1.5)  # pyright: ignore[reportOptionalMemberAccess]


def _small(kind: str) -> tuple[dict[str, Any], ByoModelCfg]:
    """Options of a small network for us and for timm."""
    width = (32, 48, 64, 96)
    stage: list[dict[str, Any]] = [dict(c=c, s=1 + (i > 0), gs=0, br=0.5) for i, c in enumerate(width)]  # noqa: C408
    halo = {"block_size": 4, "halo_size": 1, "num_heads": 2}
    ours: dict[str, Any] = {
        "dims": width,
        "bottle_ratio": 0.5,
        "stem": "tiered",
        "stem_dim": 16,
        "num_heads": 2,
        "block_size": 4,
        "halo_size": 1,
        "num_classes": 7,
        "blocks": (("conv",) * 2, ("conv", "halo"), ("halo",) * 2, ("halo",)),
    }
    blocks: Any = (
        ByoBlockCfg(type="bottle", d=2, **stage[0]),
        interleave_blocks(types=TYPES, d=2, **stage[1]),
        ByoBlockCfg(type="self_attn", d=2, **stage[2]),
        ByoBlockCfg(type="self_attn", d=1, **stage[3]),
    )
    theirs: dict[str, Any] = {
        "stem_chs": 16,
        "stem_type": "tiered",
        "self_attn_layer": "halo",
        "self_attn_kwargs": halo,
    }
    if kind == "se, silu, no pooling":
        ours |= {"stem_pool": False, "act": "silu", "channel_attn": "se", "se_ratio": 0.25, "final_dim": 40}
        theirs |= {"stem_pool": "", "act_layer": "silu", "attn_layer": "se", "num_features": 40}
        theirs["attn_kwargs"] = {"rd_ratio": 0.25}
    elif kind == "odd blocks, regnet":
        ours |= {"stem": "3x3", "block_size": 3, "qk_ratio": 0.33, "group_size": 8, "final_dim": 40, "bottle_in": True}
        ours |= {"linear_out": True, "project_shortcut": False, "stem_pool": False}
        theirs |= {"stem_type": "3x3", "stem_pool": "", "downsample": "", "num_features": 40}
        theirs["block_kwargs"] = {"bottle_in": True, "linear_out": True}
        theirs["self_attn_kwargs"] = {**halo, "block_size": 3, "qk_ratio": 0.33}
        for cfg in (blocks[0], *blocks[1], *blocks[2:]):
            cfg.gs = 8
        blocks[0].s = 2
    elif kind == "eca, lambda, bottleneck":
        ours |= {"channel_attn": "eca", "head_dim": 8, "img_size": 128}
        ours["blocks"] = (("conv",) * 2, ("conv", "lambda"), ("halo",) * 2, ("bottleneck",))
        theirs |= {"attn_layer": "eca", "self_attn_kwargs": {**halo, "head_dim": 8}}
        theirs["self_attn_kwargs"] = {**halo, "dim_head": 8}
        blocks[1][1].self_attn_layer, blocks[1][1].self_attn_kwargs = "lambda", {"r": 13, "num_heads": 2}
        blocks[3].self_attn_layer, blocks[3].self_attn_kwargs = "bottleneck", {"num_heads": 2}
    return ours, ByoModelCfg(blocks=blocks, **theirs)


@pytest.mark.parametrize("name", PARAMETERS)
def test_parameter_counts_are_timms(name: str) -> None:
    assert sum(p.numel() for p in create_model(name, device="meta").parameters()) == PARAMETERS[name]


@pytest.mark.parametrize("name", PAPER_MILLIONS)
def test_parameter_counts_are_the_papers(name: str) -> None:
    millions = sum(p.numel() for p in create_model(name, device="meta").parameters()) / 1e6
    assert abs(millions - PAPER_MILLIONS[name]) < 0.06


@pytest.mark.parametrize(
    ("kind", "size", "train", "dtype"),
    [
        ("plain", (128, 256), True, torch.float64),
        ("plain", (128, 128), False, torch.float32),
        ("se, silu, no pooling", (128, 128), False, torch.float64),
        ("odd blocks, regnet", (96, 192), False, torch.float64),
        ("odd blocks, regnet", (96, 96), False, torch.float32),
        ("eca, lambda, bottleneck", (128, 128), True, torch.float64),
    ],
    ids=str,
)
def test_logits_and_gradients_equal_timms(kind: str, size: tuple[int, int], train: bool, dtype: torch.dtype) -> None:
    ours, theirs = _small(kind)
    peer = ByobNet(theirs, num_classes=7, img_size=128).to(dtype)
    _redraw(peer)
    model = load_official(HaloNet(**ours).to(dtype), peer.state_dict())
    x = torch.randn(2, 3, *size, dtype=dtype)
    # torch's gradient of timm's Conv3d is wrong in the usual memory order
    x = x.contiguous(memory_format=torch.channels_last)
    names = official_names(model, KEY_MAP["timm"])
    results: list[list[Tensor]] = []
    for net, order in ((model, list(names.values())), (peer, list(names))):
        net.train(train)
        image = x.clone().requires_grad_()
        logits = net(image)
        parameters = dict(net.named_parameters())
        wanted = [parameters[name] for name in order if name in parameters]
        grads = torch.autograd.grad(logits.square().mean(), [image, *wanted])
        results.append([logits.detach(), grads[0], *(grad.flatten() for grad in grads[1:])])
    bound = 1e-10 if dtype == torch.float64 else 1e-5
    for actual, expected in zip(*results, strict=True):
        assert (actual - expected).abs().max() <= bound * max(1.0, float(expected.abs().max()))


@pytest.mark.parametrize("kind", ["plain", "eca, lambda, bottleneck"])
def test_a_fresh_network_has_the_spread_of_timms(kind: str) -> None:
    ours, theirs = _small(kind)
    model, peer = HaloNet(**ours), ByobNet(theirs, num_classes=7, img_size=128)
    state, expected = model.state_dict(), peer.state_dict()
    for official, own in official_names(model, KEY_MAP["timm"]).items():
        if state[own].numel() >= 80:  # of which a standard deviation is known to 8 %
            spread = float(expected[official].std())
            assert float(state[own].std()) == pytest.approx(spread, rel=0.35, abs=1e-6), official
        elif "bn" in official:
            assert torch.equal(state[own], expected[official]), official


# Stride 2 of odd blocks averages, and averages of a cut map differ.
@pytest.mark.parametrize(("block", "halo", "stride"), [(4, 1, 1), (4, 1, 2), (4, 3, 1), (4, 3, 2), (3, 2, 1)])
def test_any_size_is_the_padded_map_cut(block: int, halo: int, stride: int) -> None:
    """What lies right of and below an odd map counts as its border: zeros before the projection, cut behind it."""
    options: dict[str, Any] = {"num_heads": 2, "stride": stride}
    peer = HaloAttn(16, block_size=block, halo_size=halo, **options).double()
    ours = halo_attention.HaloAttention(
        16, 16, head_dim=None, qk_ratio=1.0, block=block, halo=halo, border="zero", **options
    ).double()
    for own, other in ((ours.q, peer.q), (ours.kv, peer.kv)):
        own.weight.data = other.weight.data[:, :, 0, 0]
    ours.height_rel.data, ours.width_rel.data = peer.pos_embed.height_rel.data, peer.pos_embed.width_rel.data
    for height, width in ((1, 1), (5, 13), (2 * block, block), (7, 3 * block + 1)):
        x = torch.randn(2, 16, height, width, dtype=torch.float64)
        expected = peer(nn.functional.pad(x, (0, -width % block, 0, -height % block)))
        rows, columns = -(-height // stride), -(-width // stride)
        torch.testing.assert_close(ours(x), expected[:, :, :rows, :columns], rtol=0, atol=1e-12)


@pytest.mark.parametrize("kind", ["plain", "odd blocks, regnet", "eca, lambda, bottleneck"])
def test_odd_images_work_where_timm_fails(kind: str) -> None:
    ours, theirs = _small(kind)
    x = torch.randn(1, 3, 225, 193)
    with torch.no_grad():
        maps: Any = HaloNet(**ours).eval().forward_intermediates(x, intermediates_only=True)
        assert [tuple(level.shape[2:]) for level in maps] == [(57, 49), (29, 25), (15, 13), (8, 7)]
        with pytest.raises(AssertionError):
            ByobNet(theirs, img_size=128)(x)


def test_masked_border_hides_what_is_outside() -> None:
    masked, zero = (create_model("test_halonet", border=border).eval() for border in ("masked", "zero"))
    _redraw(zero)
    masked.load_state_dict(zero.state_dict())
    attn: Any = zero.stages[2].blocks[0].middle.self_attn  # pyright: ignore[reportAttributeAccessIssue, reportIndexIssue]
    hidden: Any = masked.stages[2].blocks[0].middle.self_attn  # pyright: ignore[reportAttributeAccessIssue, reportIndexIssue]
    x = torch.randn(1, 32, 4, 8)
    attn.kv.weight.data[:] = hidden.kv.weight.data[:] = 0.1
    ones = torch.ones_like(x)
    out = hidden(ones)
    # all keys that take part carry the same value, so their mean is that value
    value = hidden.kv(ones.permute(0, 2, 3, 1)).unflatten(-1, (2, -1))[0, 0, 0, :, hidden.head_dim :].flatten()
    torch.testing.assert_close(out[0, :, 0, 0], value)
    assert bool((attn(ones)[0, :, 0, 0].abs() < value.abs()).all())


def test_offsets_beyond_the_table_have_its_last_entry() -> None:
    layer = halo_attention.BottleneckAttention(16, stride=1, num_heads=2, feat_size=(3, 4)).double()
    peer = BottleneckAttn(16, feat_size=(6, 5), num_heads=2).double()
    layer.reset_parameters()
    peer.qkv.weight.data = layer.qkv.weight.data[:, :, None, None]
    for ours, theirs in ((layer.height_rel, peer.pos_embed.height_rel), (layer.width_rel, peer.pos_embed.width_rel)):
        more = (len(theirs) - len(ours)) // 2
        theirs.data = torch.cat([ours.data[:1].expand(more, -1), ours.data, ours.data[-1:].expand(more, -1)])
    x = torch.randn(1, 16, 6, 5, dtype=torch.float64)
    torch.testing.assert_close(layer(x), peer(x), rtol=0, atol=1e-12)


def test_timms_first_paper_network_is_ours_with_eight_heads() -> None:
    peer = timm.create_model("halonet_h1", device="meta")
    ours = create_model("halonet_h1", num_heads=8, device="meta")
    names = official_names(ours, KEY_MAP["timm"])
    shapes = {name: value.numel() for name, value in peer.state_dict().items()}
    ours_state = ours.state_dict()
    assert {name: ours_state[own].numel() for name, own in names.items()} == shapes


@pytest.mark.parametrize("name", PARAMETERS)
def test_names_of_timms_checkpoints_are_ours_after_the_key_map(name: str) -> None:
    peer = timm.create_model(name, device="meta")
    names = official_names(create_model(name, device="meta"), KEY_MAP["timm"])
    assert set(names) == set(peer.state_dict())


def test_timms_own_checkpoint_loads_as_it_is() -> None:
    peer: Any = timm.create_model("eca_halonext26ts", num_classes=3).double().eval()
    _redraw(peer)
    model = load_official(create_model("eca_halonext26ts", num_classes=3).double(), peer.state_dict()).eval()
    x = torch.randn(1, 3, 256, 256, dtype=torch.float64)
    with torch.no_grad():
        torch.testing.assert_close(model(x), peer(x), rtol=1e-10, atol=1e-10)
    again = create_model("eca_halonext26ts", num_classes=3).double()
    model_state = model.state_dict()
    state = {name: model_state[own] for name, own in official_names(model, KEY_MAP["timm"]).items()}
    load_official(again, {"state_dict": state})
    assert all(torch.equal(value, model_state[name]) for name, value in again.state_dict().items())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_trains_with_finite_gradients(dtype: torch.dtype) -> None:
    model = create_model("test_halonet", dtype=dtype)
    model(torch.randn(2, 3, 96, 96, dtype=dtype)).float().square().mean().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())


def test_convolutions_stand_in_the_first_stages_of_the_hybrids() -> None:
    for stages in (1, 2):
        kinds = [set(stage) for stage in VARIANTS[f"halonet_h7_conv{stages}"]["blocks"]]
        assert kinds == [{"conv"}] * stages + [{"halo"}] * (4 - stages)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"dims": (32, 64)}, "dims must have one entry for each of 4 stages"),
        ({"bottle_ratio": (2.0,)}, "bottle_ratio must have one entry for each of 4 stages"),
        (
            {"blocks": (("hallo",), (), (), ())},
            "blocks must be of the kinds conv, halo, bottleneck, lambda, got 'hallo'",
        ),
        ({"block_size": 0}, r"block_size must be positive, halo_size not negative, got \(0, 3\)"),
        ({"stem": "5x5"}, "stem must be one of .*, got stem='5x5'"),
        ({"act": "gelu"}, "act must be one of .*, got act='gelu'"),
        ({"channel_attn": "cbam"}, "channel_attn must be one of .*, got channel_attn='cbam'"),
        ({"border": "none"}, "border must be one of .*, got border='none'"),
        ({"num_heads": 5}, "num_heads must divide 64 channels, got num_heads=5"),
        ({"blocks": (("conv",),) * 4, "group_size": 7}, "group_size must divide 64 channels, got group_size=7"),
    ],
)
def test_wrong_options_are_named(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=f"HaloNet: .*{message}"):
        HaloNet(**options)
