"""VM-UNet against a plain network that loops over tokens; official names; scans that keep nothing of all states."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from medical_seg.layers.state_space.walks import StateSpaces, Walks, doubled, walk_both_ways
from medical_seg.models import create_model, is_planar, load_official
from medical_seg.models.vm_unet import Deep, DeepUp, VMUNet, load_vmamba

State = dict[str, Tensor]


def part(state: State, name: str) -> State:
    return {key.removeprefix(f"{name}."): value for key, value in state.items() if key.startswith(f"{name}.")}


def norm(state: State, name: str, x: Tensor) -> Tensor:
    """Over the last axis, eps 1e-5."""
    centered = x - x.mean(-1, keepdim=True)
    scaled = centered / (centered.square().mean(-1, keepdim=True) + 1e-5).sqrt()
    return scaled * state[f"{name}.weight"] + state[f"{name}.bias"]


def walk(state: State, way: int, tokens: Tensor) -> Tensor:
    """One state space over tokens (B, T, C), one token after the other."""
    channels, rank = state["dt_projs_weight"].shape[1:]
    decay = -state["A_logs"].view(4, channels, -1)[way].exp()
    width = decay.shape[1]
    h, out = torch.zeros(len(tokens), channels, width, dtype=tokens.dtype), []
    for x in tokens.unbind(1):
        low, entry, leave = (x @ state["x_proj_weight"][way].T).split([rank, width, width], -1)
        step = F.softplus(low @ state["dt_projs_weight"][way].T + state["dt_projs_bias"][way])
        h = (step[..., None] * decay).exp() * h + (step * x)[..., None] * entry[:, None]
        out.append((h * leave[:, None]).sum(-1) + state["Ds"].view(4, channels)[way] * x)
    return torch.stack(out, 1)


def convolved(state: State, x: Tensor) -> Tensor:
    """Depthwise 3×3 with SiLU, channels last."""
    kernel, bias = state["conv2d.weight"], state["conv2d.bias"]
    padded = F.pad(x, (0, 0, 1, 1, 1, 1))
    height, width = x.shape[1:3]
    total = bias + sum(
        kernel[:, 0, a, b] * padded[:, a : a + height, b : b + width] for a in range(3) for b in range(3)
    )
    return total * torch.sigmoid(total)


def plain_ss2d(state: State, x: Tensor) -> Tensor:
    inner, gate = (x @ state["in_proj.weight"].T).chunk(2, -1)
    inner = convolved(state, inner)
    batch, height, width, channels = inner.shape
    rows, columns = inner.reshape(batch, -1, channels), inner.transpose(1, 2).reshape(batch, -1, channels)
    y = walk(state, 0, rows) + walk(state, 2, rows.flip(1)).flip(1)
    z = walk(state, 1, columns) + walk(state, 3, columns.flip(1)).flip(1)
    y = y.view(inner.shape) + z.view(batch, width, height, channels).transpose(1, 2)
    return (norm(state, "out_norm", y) * F.silu(gate)) @ state["out_proj.weight"].T


def expanded(state: State, name: str, x: Tensor, scale: int) -> Tensor:
    x = x @ state[f"{name}.expand.weight"].T
    batch, height, width, channels = x.shape
    y = x.new_zeros(batch, scale * height, scale * width, channels // scale**2)
    for a in range(scale):
        for b in range(scale):
            at = (a * scale + b) * y.shape[-1]
            y[:, a::scale, b::scale] = x[..., at : at + y.shape[-1]]
    return norm(state, f"{name}.norm", y)


def plain_unet(state: State, x: Tensor, mix: Any, levels: int) -> Tensor:
    """The U around blocks that ``mix(state, x)`` computes."""

    def blocks(name: str, x: Tensor) -> Tensor:
        index = 0
        while own := part(state, f"{name}.blocks.{index}"):
            x = x + mix(part(own, "self_attention"), norm(own, "ln_1", x))
            index += 1
        return x

    x = F.conv2d(x, state["patch_embed.proj.weight"], state["patch_embed.proj.bias"], stride=4)
    x = norm(state, "patch_embed.norm", x.permute(0, 2, 3, 1))
    kept = []
    for level in range(levels):
        kept.append(x)
        x = blocks(f"layers.{level}", x)
        if level < levels - 1:
            four = torch.cat([x[:, ::2, ::2], x[:, 1::2, ::2], x[:, ::2, 1::2], x[:, 1::2, 1::2]], -1)
            x = norm(state, f"layers.{level}.downsample.norm", four)
            x = x @ state[f"layers.{level}.downsample.reduction.weight"].T
    for level in range(levels):
        if level:
            x = expanded(state, f"layers_up.{level}.upsample", x + kept[levels - level], 2)
        x = blocks(f"layers_up.{level}", x)
    x = expanded(state, "final_up", x, 4)
    weight, bias = state["final_conv.weight"][:, :, 0, 0], state["final_conv.bias"]
    return (x @ weight.T + bias).permute(0, 3, 1, 2)


def stirred(name: str, **options: Any) -> Any:
    """A network in float64 whose parameters are all away from their start values."""
    torch.manual_seed(0)
    model: Any = create_model(name, **options).double()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    return model


def assert_equal_with_gradients(model: Any, x: Tensor, mix: Any, levels: int) -> None:
    model.eval()
    state = {key: value.detach().clone() for key, value in model.state_dict().items()}
    for key, _ in model.named_parameters():
        state[key].requires_grad_()
    ours, plain = model(x), plain_unet(state, x, mix, levels)
    assert torch.allclose(ours, plain, rtol=0, atol=1e-11 * float(plain.detach().abs().max()))
    weight = torch.randn_like(ours)
    (ours * weight).sum().backward()
    (plain * weight).sum().backward()
    for key, parameter in model.named_parameters():
        expected: Any = state[key].grad
        assert torch.allclose(parameter.grad, expected, rtol=0, atol=1e-10 * max(1.0, float(expected.abs().max()))), key


def test_outputs_and_gradients_equal_the_plain_network() -> None:
    model = stirred("test_vm_unet", in_channels=2, out_channels=3, depths=(1, 1, 1), depths_up=(1, 1, 1), width=8)
    assert_equal_with_gradients(model, torch.randn(2, 2, 16, 32, dtype=torch.float64), plain_ss2d, 3)


def test_parameters_of_all_depths() -> None:
    with torch.device("meta"):
        for depths, up, count in (((2, 2, 2, 2), (2, 2, 2, 1), 27_427_561), (Deep, DeepUp, 44_273_833)):
            model = VMUNet(depths=depths, depths_up=up)
            assert sum(p.numel() for p in model.parameters()) == count
            assert model.divisor == 32
        assert sum(p.numel() for p in create_model("vm_unet").parameters()) == 27_427_561
        assert sum(p.numel() for p in create_model("vm_unet_deep").parameters()) == 44_273_833
    assert is_planar("vm_unet")
    assert is_planar("mhs_vm")


def test_official_names_are_ours_and_one_channel_reads_what_three_repeat(tmp_path: Path) -> None:
    source = stirred("test_vm_unet", in_channels=3)
    block = "layers.0.blocks.0.self_attention"
    own = {f"{block}.{name}" for name in ("x_proj_weight", "dt_projs_weight", "dt_projs_bias", "A_logs", "Ds")}
    own |= {"patch_embed.proj.bias", "layers.0.downsample.reduction.weight", "layers_up.1.upsample.expand.weight"}
    assert own | {"final_up.norm.bias", "final_conv.bias", f"{block}.conv2d.weight"} <= set(source.state_dict())
    torch.save({f"vmunet.{key}": value for key, value in source.state_dict().items()}, tmp_path / "best.pth")
    three = load_official(stirred("test_vm_unet", in_channels=3), tmp_path / "best.pth")
    one = load_official(stirred("test_vm_unet", in_channels=1), tmp_path / "best.pth").eval()
    three_state = three.state_dict()
    assert all(torch.equal(value, three_state[key]) for key, value in source.state_dict().items())
    x = torch.randn(1, 1, 8, 16, dtype=torch.float64)
    assert torch.allclose(one(x), source.eval()(x.expand(-1, 3, -1, -1)), atol=1e-12)
    with pytest.raises(ValueError, match=r"does not fit this VMUNet: .*final_conv\.weight is \(1, 4, 1, 1\)"):
        load_official(stirred("test_vm_unet", in_channels=3, out_channels=2), tmp_path / "best.pth")


def test_vmamba_fills_the_encoder_and_the_decoder_in_reverse() -> None:
    options: dict[str, Any] = {"depths": (1, 2), "depths_up": (2, 1), "in_channels": 3}
    vmamba = stirred("test_vm_unet", depths=(3, 4), depths_up=(1, 1), in_channels=3).state_dict()
    theirs = {key: value for key, value in vmamba.items() if key.startswith(("patch_embed", "layers."))}
    model = create_model("test_vm_unet", **options).double()
    kept = model.get_parameter("final_up.expand.weight").clone()
    found = load_vmamba(model, {"model": {**theirs, "head.weight": torch.zeros(2)}}).state_dict()  # type: ignore[arg-type]
    for ours, source in (
        ("layers.1.blocks.1.ln_1.weight", "layers.1.blocks.1.ln_1.weight"),
        ("layers.0.downsample.norm.bias", "layers.0.downsample.norm.bias"),
        ("layers_up.0.blocks.1.self_attention.Ds", "layers.1.blocks.1.self_attention.Ds"),
        ("layers_up.1.blocks.0.self_attention.A_logs", "layers.0.blocks.0.self_attention.A_logs"),
    ):
        assert torch.equal(found[ours], theirs[source])
    assert torch.equal(found["final_up.expand.weight"], kept)
    del theirs["layers.1.blocks.1.ln_1.weight"]
    with pytest.raises(ValueError, match=r"load_vmamba: .*missing layers\.1\.blocks\.1\.ln_1\.weight"):
        load_vmamba(create_model("test_vm_unet", **options), theirs)  # type: ignore[arg-type]


def test_start_values_are_mamba_s() -> None:
    torch.manual_seed(0)
    spaces = StateSpaces(512, 16, 4)
    assert torch.allclose(spaces.A_logs[77].exp(), torch.arange(1.0, 17))
    step = F.softplus(spaces.dt_projs_bias)
    assert 1e-3 * 0.999 <= step.min() < 1.1e-3
    assert 0.095 < step.max() <= 0.1001
    assert 0.49 < spaces.dt_projs_weight.abs().max() <= 0.5
    assert 0.99 * 512**-0.5 < spaces.x_proj_weight.abs().max() <= 512**-0.5
    assert spaces.Ds.unique().tolist() == [1.0]
    linear = create_model("test_vm_unet").get_parameter("layers.0.downsample.reduction.weight")
    assert 0.015 < linear.std() < 0.025


def test_stochastic_depth_rises_to_the_bottom_and_drops_whole_samples() -> None:
    model: Any = create_model("test_vm_unet", depths=(2, 2), depths_up=(2, 1), drop_path=0.3)
    rates = [block.drop_path for stage in (*model.layers, *model.layers_up) for block in stage.blocks]
    assert rates == pytest.approx([0, 0.1, 0.2, 0.3, 0.3, 0.15, 0])
    block = model.layers_up[0].blocks[0].train()
    block.drop_path = 0.5
    x = torch.randn(64, 2, 2, 32)
    change = (block(x) - x).flatten(1)
    dropped = change.abs().amax(1) == 0
    assert 16 <= int(dropped.sum()) <= 48
    block.eval()
    assert torch.allclose(change[~dropped], 2 * (block(x) - x).flatten(1)[~dropped], atol=1e-5)


@pytest.mark.parametrize("reverse", [False, True])
def test_the_scan_of_exported_graphs_equals_the_operator(reverse: bool) -> None:
    torch.manual_seed(0)
    spaces = StateSpaces(4, 3, 2).double()
    x = torch.randn(2, 4, 4, 11, dtype=torch.float64)
    walks: Walks = spaces.walks()
    expected = walk_both_ways(x, walks, walks)[int(reverse)]
    low, entry, leave = torch.einsum("bsct,skc->bskt", x, walks.maps).split([2, 3, 3], 2)
    delta = torch.einsum("bsrt,scr->bsct", low, walks.step)
    flat = (x.flatten(1, 2), delta.flatten(1, 2), -walks.decay.exp().flatten(0, 1), entry, leave)
    found = doubled(*flat, walks.skip.flatten(), walks.bias.flatten(), reverse)
    assert torch.allclose(found.view(x.shape), expected, atol=1e-12)


def test_training_keeps_no_states_of_all_tokens() -> None:
    """They would be T·C·N numbers for each of four walks: 16 times what is scanned."""
    model: Any = create_model("test_vm_unet", width=16, states=16, depths=(1,), depths_up=(0,))
    x = torch.randn(1, 3, 128, 128)
    kept: list[int] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: (kept.append(t.numel()), t)[1], lambda t: t):
        model(x).sum().backward()
    scanned = 32 * 32 * 32 * 2  # tokens, inner channels, both routes
    assert max(kept) <= 2 * scanned  # the picture has 49,152 numbers


def test_batches_do_not_mix_and_autocast_stays_near() -> None:
    model: Any = create_model("test_vm_unet").eval()
    x = torch.randn(2, 3, 16, 8)
    whole = model(x)
    assert torch.allclose(model(x[1:]), whole[1:], atol=1e-5)
    with torch.autocast("cpu", torch.bfloat16):
        assert (model(x).float() - whole).abs().max() < 0.1 * whole.abs().max() + 0.05


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: VMUNet(0), "in_channels and out_channels must be at least 1, got 0 and 1"),
        (lambda: VMUNet(depths=(1, 1), depths_up=(1,)), r"depths \(1, 1\) and depths_up \(1,\) must be equally many"),
        (lambda: VMUNet(width=10), "width=10 must be a multiple of 4"),
        (lambda: VMUNet(drop_path=1.0), r"drop_path must lie in \[0, 1\), got 1.0"),
        (lambda: create_model("test_vm_unet")(torch.zeros(3, 8, 8)), r"expected \(B C Y X\), got shape \(3, 8, 8\)"),
        (lambda: create_model("test_vm_unet")(torch.zeros(1, 1, 8, 8)), "the network reads 3 channels, got 1"),
        (
            lambda: create_model("test_vm_unet")(torch.zeros(1, 3, 12, 8)),
            "image 12×8 is not divisible by 8; pad to 16×8",
        ),
    ],
)
def test_mistakes_are_named(make: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()
