"""BMN and class-semantics attention beside plain functions of the same weights; options, weights, wrong input."""

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from detection import create_model, load_official
from detection.models import card
from detection.models.bmn.network import BMN, ClassSemanticsAttention

SMALL: dict[str, Any] = {"width": 8, "pair_width": 12, "map_width": 6, "bins": 3}


def small(**options: Any) -> BMN:
    """A network of 8 features and 7 steps, in float64, with attentions that weigh."""
    torch.manual_seed(0)
    net = BMN(8, 7, **{**SMALL, **options}).double()
    if net.csa is not None:
        for layer in (net.csa.excite, net.csa.time):
            torch.nn.init.normal_(layer.weight)
    for attention in (net.csa, net.se):
        if attention is not None:
            attention.squeeze.bias.data[0], attention.squeeze.bias.data[1:] = 2, -0.5  # one open ReLU, one closed
    return net.eval()


def sigmoid(x: Tensor) -> Tensor:
    return 1 / (1 + torch.exp(-x))


def plain(net: BMN, mask: Tensor, x: Tensor, semantics: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
    """The network of the papers from its weights: groups cut by hand, the dense mask, no module of ours."""
    p = dict(net.named_parameters())

    def conv(name: str, y: Tensor, groups: int = 1) -> Tensor:
        weight, bias = p[f"{name}.weight"], p[f"{name}.bias"]
        padded = F.pad(y, (weight.shape[2] // 2,) * 2)
        windows = padded.unfold(2, weight.shape[2], 1)  # (B, C, T, k)
        parts = zip(windows.chunk(groups, 1), weight.chunk(groups, 0), strict=True)
        return torch.cat([torch.einsum("bctk,ock->bot", one, own) for one, own in parts], 1) + bias[:, None]

    def linear(name: str, y: Tensor) -> Tensor:
        return y @ p[f"{name}.weight"].T + p[f"{name}.bias"]

    def positive(y: Tensor) -> Tensor:
        return y.clamp(min=0)

    encoded = positive(conv("x_1d_b.2", positive(conv("x_1d_b.0", x, 4)), 4))
    if net.se is not None:
        gate = sigmoid(linear("se.excite", positive(linear("se.squeeze", encoded.mean(2)))))
        encoded = encoded * gate[:, :, None]
    if net.csa is not None:
        meaning = x if semantics is None else semantics
        channel = sigmoid(linear("csa.excite", positive(linear("csa.squeeze", meaning.mean(2)))))[:, :, None]
        time = sigmoid(conv("csa.time", meaning))
        both = torch.stack([encoded * channel, encoded * time])
        encoded = {"sum": both.sum(0), "mean": both.mean(0), "max": both.amax(0)}[net.csa.fuse]
    start, end = (sigmoid(conv(f"{n}.2", positive(conv(f"{n}.0", encoded, 4))))[:, 0] for n in ("x_1d_s", "x_1d_e"))
    paired = positive(conv("x_1d_p.0", encoded))
    longest = net.matching.longest
    steps = torch.arange(7)
    mask = mask * (steps[None, :] - steps[:, None] < longest)
    samples = torch.einsum("bct,tnse->bcnse", paired, mask)
    maps = positive(torch.einsum("bcnse,noc->bose", samples, p["matching.weight"]) + p["matching.bias"][:, None, None])
    for number in (0, 2, 4, 6):
        maps = F.conv2d(
            maps, p[f"x_2d_p.{number}.weight"], p[f"x_2d_p.{number}.bias"], padding=(0, 1, 1, 0)[number // 2]
        )
        maps = positive(maps) if number < 6 else sigmoid(maps)
    return maps, start, end


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"longest": 4},
        {"csa": "sum"},
        {"csa": "mean", "se": True},
        {"csa": "max", "semantics": 5},
        {"se": True},
    ],
)
def test_output_and_gradients_equal_a_plain_network(
    options: dict[str, Any], mask_of_samples: Callable[..., Tensor]
) -> None:
    net = small(**options)
    semantics = torch.rand(3, 5, 7, dtype=torch.float64) if "semantics" in options else None
    x = torch.randn(3, 8, 7, dtype=torch.float64, requires_grad=True)
    weights = [torch.randn(3, 2, 7, 7), torch.randn(3, 7), torch.randn(3, 7)]
    gradients = []
    for found in (net(x, semantics), plain(net, mask_of_samples(7, 3, 3, 0.5), x, semantics)):
        total = torch.stack([(own * weight).sum() for own, weight in zip(found, weights, strict=True)]).sum()
        gradients.append((found, torch.autograd.grad(total, (x, *net.parameters()))))
    for ours, theirs in zip(gradients[0][0], gradients[1][0], strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-11)
    for ours, theirs in zip(gradients[0][1], gradients[1][1], strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-8, atol=1e-11)
        assert theirs.abs().max() > 0


def test_published_networks_have_the_published_number_of_parameters() -> None:
    """BMN's equals that of the official code without its mask, which was counted."""
    counts = {"bmn_activitynet": 4_978_564, "bmn_thumos": 4_978_564, "bmn_csa_activitynet": 5_045_721,
              "bmn_csa_thumos": 5_045_721}  # fmt: skip
    for name, count in counts.items():
        with torch.device("meta"):
            net: Any = create_model(name)
        assert sum(p.numel() for p in net.parameters()) == count
        assert [net.steps, net.matching.longest] == ([100, 100] if "activity" in name else [128, 64])
    assert card("bmn_csa_thumos").license == card("bmn_csa_thumos").code == ""  # a reconstruction


def test_official_checkpoints_load_without_their_mask(tmp_path: Path) -> None:
    net = small()
    official = {name.replace("matching.", "x_3d_p.0."): value for name, value in net.state_dict().items()}
    official["x_3d_p.0.weight"] = official["x_3d_p.0.weight"].permute(1, 2, 0)[..., None, None]
    state = {f"module.{name}": value for name, value in official.items()} | {"module.sample_mask": torch.zeros(7, 147)}
    torch.save({"epoch": 3, "state_dict": state}, tmp_path / "BMN_best.pth.tar")
    torch.manual_seed(1)
    other = BMN(8, 7, **SMALL).double()
    load_official(other, tmp_path / "BMN_best.pth.tar")
    x = torch.randn(1, 8, 7, dtype=torch.float64)
    torch.testing.assert_close(other(x), net(x))
    load_official(other, net.state_dict())
    del state["module.x_1d_p.0.bias"]
    with pytest.raises(ValueError, match=re.escape("missing x_1d_p.0.bias")):
        load_official(other, {"state_dict": state})
    with pytest.raises(ValueError, match=re.escape("missing csa.squeeze.weight")):
        load_official(small(csa="sum"), {"state_dict": official})
    load_official(small(csa="sum"), {"state_dict": official}, ignore=("csa.",))


def test_attention_that_weighs_everything_with_one_is_the_host() -> None:
    host, x = small(), torch.randn(2, 8, 7, dtype=torch.float64)
    for fuse in ("mean", "max"):
        net: Any = small(csa=fuse)
        net.load_state_dict(host.state_dict(), strict=False)
        for layer in (net.csa.excite, net.csa.time):
            layer.weight.data.zero_()
            layer.bias.data.fill_(50)
        torch.testing.assert_close(net(x), host(x))
    fresh = BMN(8, 7, **SMALL, csa="sum").double()  # both weights begin as 1/2
    fresh.load_state_dict(host.state_dict(), strict=False)
    torch.testing.assert_close(fresh(x), host(x))


def test_attention_is_learned_from_the_semantics_alone() -> None:
    net: Any = small(csa="sum", semantics=5)
    meaning = torch.rand(2, 5, 7, dtype=torch.float64)
    channel, time = net.csa.attentions(meaning)
    assert (channel.shape, time.shape) == ((2, 8, 1), (2, 1, 7))
    x = torch.randn(2, 8, 7, dtype=torch.float64)
    torch.testing.assert_close(net.csa(x, meaning), x * channel + x * time)
    wide = ClassSemanticsAttention(8, 5, per_channel=True, kernel=5, reduction=2)
    assert wide.attentions(meaning.float())[1].shape == (2, 8, 7)
    assert (wide.squeeze.out_features, wide.time.kernel_size) == (2, (5,))


def test_a_row_of_a_batch_is_the_row_alone_and_a_batch_may_be_empty() -> None:
    net = small(csa="sum", se=True)
    x = torch.randn(3, 8, 7, dtype=torch.float64)
    whole = net(x)
    for one, other in zip(net(x[1:2]), whole, strict=True):
        torch.testing.assert_close(one[0], other[1])
    assert [tuple(each.shape) for each in net(x[:0])] == [(0, 2, 7, 7), (0, 7), (0, 7)]
    with torch.autocast("cpu", torch.bfloat16):
        half = net.float()(x.float())
    torch.testing.assert_close(half.pairs.double(), whole.pairs, rtol=0.1, atol=0.05)


def test_pairs_that_can_be_are_those_that_end_after_they_start_and_are_short_enough() -> None:
    assert small().valid().tolist() == torch.ones(7, 7).triu().tolist()
    assert small(longest=3).valid().tolist() == (torch.ones(7, 7).triu() - torch.ones(7, 7).triu(3)).tolist()


def test_the_network_exports() -> None:
    net, x = small(csa="sum").float(), torch.randn(2, 8, 7)
    exported = torch.export.export(net, (x,), strict=False).module()
    torch.testing.assert_close(tuple(exported(x)), tuple(net(x)), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"features": 10}, "BMN: features must be a multiple of 4, got features=10"),
        ({"width": 6}, "BMN: width must be a multiple of 4, got width=6"),
        ({"map_width": 0}, "BMN: map_width must be at least 1, got map_width=0"),
        ({"semantics": 5}, "BMN: semantics=5 are read by csa only"),
        ({"csa": "product"}, "fuse must be 'sum', 'mean' or 'max', got fuse='product'"),
        ({"csa": "sum", "semantics": 0}, "semantics must be at least 1, got semantics=0"),
        ({"pair_width": 0}, "out_channels must be at least 1, got out_channels=0"),
    ],
)
def test_sizes_that_do_not_fit_are_named(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        BMN(**{"features": 8, "steps": 7, **SMALL, **options})


def test_inputs_that_do_not_fit_are_named() -> None:
    x = torch.zeros(2, 8, 7)
    for net, inputs, message in (
        (BMN(8, 7, **SMALL), (x[:, :4],), "features must be (B, 8, 7), got (2, 4, 7)"),
        (BMN(8, 7, **SMALL, csa="sum", semantics=5), (x,), "this network reads semantics of 5 channels"),
        (BMN(8, 7, **SMALL, csa="sum", semantics=5), (x, x), "semantics must be (2, 5, 7), got (2, 8, 7)"),
    ):
        with pytest.raises(ValueError, match=re.escape(message)):
            net(*inputs)
    with pytest.raises(ValueError, match="kernel must be odd, got kernel=4"):
        ClassSemanticsAttention(8, 8, kernel=4)
    with pytest.raises(ValueError, match="reduction must be at least 1, got reduction=0"):
        ClassSemanticsAttention(8, 8, reduction=0)
