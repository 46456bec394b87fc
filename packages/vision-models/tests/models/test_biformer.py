"""BiFormer's numbers against a plain network, its gathered formulation and loops over tokens; checkpoints; errors."""

import argparse
import math
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from attn_core.weights import official_names
from vision_models import BiFormer, BiFormerDense, create_model, load_official
from vision_models.bench.gathered import gathered
from vision_models.layers.bilevel_routing import RoutedAttention
from vision_models.models.biformer import KEY_MAP

SMALL: dict[str, Any] = {"depths": (1, 1, 1, 1), "dims": (16, 32, 32, 64), "head_dim": 16, "topks": (1, 4, 9, -2)}


def randomized(model: nn.Module) -> nn.Module:
    """Weights and BatchNorm statistics far from initialization, in float64."""
    model.double()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            scale = parameter[0].numel() ** -0.5 if parameter.ndim > 1 else 0.3
            parameter.copy_(torch.randn_like(parameter) * scale + (parameter.ndim == 1 and name.endswith("weight")))
        for name, buffer in model.named_buffers():
            if name.endswith("running_mean"):
                buffer.normal_(0, 0.3)
            elif name.endswith("running_var"):
                buffer.uniform_(0.5, 1.5)
    return model


def relative(actual: Tensor, expected: Tensor) -> float:
    return float((actual - expected).detach().abs().max() / expected.detach().abs().max())


@pytest.mark.parametrize(
    ("name", "count"),
    [
        ("biformer_tiny", 13_142_760),
        ("biformer_small", 25_536_232),
        ("biformer_base", 56_804_968),
        ("biformer_stl", 28_372_552),
        ("biformer_stl_nchw", 28_372_552),
    ],
)
def test_parameter_count_is_the_published_one(name: str, count: int) -> None:
    assert sum(p.numel() for p in create_model(name, device="meta").parameters()) == count


OPTIONS: dict[str, dict[str, Any]] = {
    "default": {},
    "layer scale": {"layer_scale_init_value": 0.1},
    "post norm": {"pre_norm": False},
    "post norm with layer scale": {"pre_norm": False, "layer_scale_init_value": 0.1},
    "convolution in the MLP": {"mlp_dwconv": True},
    "no positional convolution": {"before_attn_dwconv": 0},
    "LePE 3": {"side_dwconv": 3},
    "no LePE": {"side_dwconv": 0},
    "no output projection": {"param_attention": "qkv"},
    "narrow queries": {"qk_dims": (16, 16, 64, 64)},
    "narrow heads": {"head_dim": 8},
    "own scale": {"qk_scale": 0.07},
    "soft routing": {"soft_routing": True},
    "differentiable routing": {"soft_routing": True, "diff_routing": True},
    "learned routing": {"soft_routing": True, "diff_routing": True, "param_routing": True},
    "full attention without LePE": {"topks": (1, 4, -1, -1)},
    "LePE on values": {"lepe_source": "value"},
    "convolutions for attention": {"topks": (0, 4, 0, -2)},
    "adaptive mean keys": {"kv_downsample_mode": "ada_avgpool", "kv_per_wins": (2, 2, 1, 1)},
    "adaptive max keys": {"kv_downsample_mode": "ada_maxpool", "kv_per_wins": (3, 2, 1, 1)},
    "mean keys": {"kv_downsample_mode": "avgpool", "kv_downsample_ratios": (2, 2, 1, 1)},
    "max keys": {"kv_downsample_mode": "maxpool", "kv_downsample_ratios": (2, 1, 1, 1)},
    "pooled and soft": {"kv_downsample_mode": "ada_avgpool", "kv_per_wins": (2, 1, 1, 1), "soft_routing": True},
    "patch stem": {"stem": "patch", "mlp_ratios": 2.0},
    "LayerNorm outside": {"stem": "patch", "norm_layer": "layer"},
    "regions per stage": {"n_win": (5, 4, 3, 1)},
}


SIZES = [(name, (56, 44)) for name in OPTIONS] + [(name, (64, 64)) for name in ("default", "soft routing", "mean keys")]


@pytest.mark.parametrize(("options", "size"), [(OPTIONS[name], size) for name, size in SIZES], ids=map(str, SIZES))
def test_output_and_gradients_equal_the_gathered_formulation(options: dict[str, Any], size: tuple[int, int]) -> None:
    model: Any = randomized(BiFormer(**{**SMALL, "n_win": 4, "num_classes": 7, **options})).eval()
    peer = gathered(model)
    x = torch.randn(2, 3, *size, dtype=torch.float64)
    inputs = [x.clone().requires_grad_(), x.clone().requires_grad_()]
    outputs = [net(image) for net, image in zip((model, peer), inputs, strict=True)]
    assert relative(outputs[0], outputs[1]) < 1e-10
    cotangent = torch.randn_like(outputs[0])
    for output in outputs:
        output.backward(cotangent)
    assert inputs[0].grad is not None
    assert inputs[1].grad is not None
    assert relative(inputs[0].grad, inputs[1].grad) < 1e-9
    largest = max(float(p.grad.abs().max()) for p in peer.parameters() if p.grad is not None)
    expected = dict(peer.named_parameters())
    for name, parameter in model.named_parameters():
        other = expected[name].grad
        assert parameter.grad is not None, f"{name} has no gradient"
        assert other is not None
        assert (parameter.grad - other).abs().max() <= 1e-9 * max(float(other.abs().max()), 1e-3 * largest), name


# --- a plain network over the official names, which shares no code with ours ------------------------------------------


# Whole: a second network, read beside the paper from top to bottom.
def plain(w: dict[str, Tensor], x: Tensor, options: dict[str, Any]) -> Tensor:
    """The classification network from the paper, attention as a mask over all pairs of tokens of the padded map."""
    patch, post = options.get("stem") == "patch", options.get("pre_norm") is False

    def conv(name: str, x: Tensor, **kwargs: Any) -> Tensor:
        return F.conv2d(x, w[f"{name}.weight"], w[f"{name}.bias"], **kwargs)

    def depthwise(name: str, x: Tensor) -> Tensor:
        return conv(name, x, padding=w[f"{name}.weight"].shape[2] // 2, groups=x.shape[1])

    def batch_norm(name: str, x: Tensor) -> Tensor:
        mean, var, weight, bias = (
            w[f"{name}.{part}"].view(-1, 1, 1) for part in ("running_mean", "running_var", "weight", "bias")
        )
        return (x - mean) / (var + 1e-5).sqrt() * weight + bias

    def layer_norm(name: str, x: Tensor) -> Tensor:
        mean, var = x.mean(1, keepdim=True), x.var(1, unbiased=False, keepdim=True)
        weight, bias = w[f"{name}.weight"].view(-1, 1, 1), w[f"{name}.bias"].view(-1, 1, 1)
        return (x - mean) / (var + 1e-6).sqrt() * weight + bias

    def linear(name: str, x: Tensor) -> Tensor:
        bias = w.get(f"{name}.bias")
        return F.conv2d(x, w[f"{name}.weight"][:, :, None, None], bias)

    def heads_of(x: Tensor, heads: int) -> Tensor:
        return x.flatten(2).unflatten(1, (heads, -1)).mT

    def routed(p: str, x: Tensor, heads: int, side: int, topk: int) -> Tensor:
        height, width = x.shape[2:]
        x = F.pad(x, (0, -width % side, 0, -height % side))
        q, k, v = linear(f"{p}qkv.qkv", x).chunk(3, 1)
        rows, columns = x.shape[2] // side, x.shape[3] // side
        y, c = torch.meshgrid(torch.arange(x.shape[2]), torch.arange(x.shape[3]), indexing="ij")
        region = (y // rows * side + c // columns).flatten()
        scale = x.shape[1] ** -0.5
        means = [torch.stack([part.flatten(2)[..., region == r].mean(2) for r in range(side**2)], 1) for part in (q, k)]
        chosen = (scale * means[0] @ means[1].mT).topk(topk).indices
        allowed = torch.zeros(len(x), side**2, side**2, dtype=torch.bool).scatter(2, chosen, True)
        seen = allowed[:, region][:, :, region]
        scores = heads_of(q, heads) @ heads_of(k, heads).mT * scale
        weights = scores.masked_fill(~seen[:, None], float("-inf")).softmax(-1)
        out = (weights @ heads_of(v, heads)).mT.flatten(1, 2).view_as(v) + depthwise(f"{p}lepe", v)
        return linear(f"{p}wo", out)[:, :, :height, :width]

    def full(p: str, x: Tensor) -> Tensor:
        q, k, v = (heads_of(part, 8) for part in linear(f"{p}qkv", x).chunk(3, 1))
        weights = (q @ k.mT * (x.shape[1] // 8) ** -0.5).softmax(-1)
        return linear(f"{p}proj", (weights @ v).mT.flatten(1, 2).view_as(x) + depthwise(f"{p}lepe", x))

    def mlp(p: str, x: Tensor) -> Tensor:
        x = linear(f"{p}0", x)
        if f"{p}1.dwconv.weight" in w:
            x = depthwise(f"{p}1.dwconv", x)
        return linear(f"{p}{2 if f'{p}2.weight' in w else 3}", F.gelu(x))

    def scaled(name: str, x: Tensor) -> Tensor:
        return w[name].view(-1, 1, 1) * x if name in w else x

    for i in range(4):
        p = f"downsample_layers.{i}."
        if i == 0 and patch:
            x = batch_norm(f"{p}1", conv(f"{p}0", x, stride=4))
        elif i == 0:
            x = F.gelu(batch_norm(f"{p}1", conv(f"{p}0", x, stride=2, padding=1)))
            x = batch_norm(f"{p}4", conv(f"{p}3", x, stride=2, padding=1))
        elif patch:
            x = conv(f"{p}1", batch_norm(f"{p}0", x), stride=2)
        else:
            x = batch_norm(f"{p}1", conv(f"{p}0", x, stride=2, padding=1))
        for j in range(options["depths"][i]):
            p = next(p for p in (f"stages.{i}.blocks.{j}.", f"stages.{i}.{j}.") if f"{p}norm1.weight" in w)
            if f"{p}pos_embed.weight" in w:
                x = x + depthwise(f"{p}pos_embed", x)
            y = x if post else layer_norm(f"{p}norm1", x)
            topk = options["topks"][i]
            heads = options["dims"][i] // options["head_dim"]
            attention = full(f"{p}attn.", y) if topk == -2 else routed(f"{p}attn.", y, heads, options["n_win"], topk)
            x = x + scaled(f"{p}gamma1", attention)
            x = layer_norm(f"{p}norm1", x) if post else x
            y = x if post else layer_norm(f"{p}norm2", x)
            x = x + scaled(f"{p}gamma2", mlp(f"{p}mlp.", y))
            x = layer_norm(f"{p}norm2", x) if post else x
    return F.linear(batch_norm("norm", x).mean((2, 3)), w["head.weight"], w["head.bias"])


PLAIN: dict[str, tuple[str, dict[str, Any]]] = {
    "T, S, B": ("biformer", {"mlp_dwconv": True}),
    "layer scale": ("biformer", {"mlp_dwconv": True, "layer_scale_init_value": 0.1, "depths": (2, 1, 1, 1)}),
    "post norm": ("biformer", {"mlp_dwconv": True, "pre_norm": False}),
    "STL": ("biformer_stl", {"stem": "patch", "before_attn_dwconv": 0, "mlp_ratios": 4.0}),
}


@pytest.mark.parametrize("size", [(64, 64), (64, 96)], ids=["filled", "padded"])
@pytest.mark.parametrize(("layout", "options"), list(PLAIN.values()), ids=list(PLAIN))
def test_logits_and_gradient_equal_the_plain_network(
    layout: str, options: dict[str, Any], size: tuple[int, int]
) -> None:
    options = {**SMALL, "n_win": 4 if size == (64, 64) else 3, "topks": (1, 4, 9, -2), **options}
    model: Any = randomized(BiFormer(**options, num_classes=7)).eval()
    own = model.state_dict()
    state = {official: own[ours] for official, ours in official_names(model, KEY_MAP[layout]).items()}
    x = torch.randn(2, 3, *size, dtype=torch.float64)
    results = []
    for net in (model, lambda image: plain(state, image, options)):
        image = x.clone().requires_grad_()
        logits = net(image)
        results.append((logits, torch.autograd.grad(logits.square().sum(), image)[0]))
    for actual, expected in zip(*results, strict=True):
        assert relative(actual, expected) < 1e-9


def test_each_option_changes_the_result() -> None:
    x = torch.randn(1, 3, 64, 64, dtype=torch.float64)
    seen: dict[str, Tensor] = {}
    for name, options in OPTIONS.items():
        torch.manual_seed(0)
        model = randomized(BiFormer(**{**SMALL, "n_win": 4, "num_classes": 7, **options})).eval()
        with torch.no_grad():
            seen[name] = model(x)
    same = [name for name, out in seen.items() if name != "default" and torch.equal(out, seen["default"])]
    # The gradient, not the output, tells differentiable from plain soft routing.
    assert same == []


def loops(module: RoutedAttention, x: Tensor) -> Tensor:
    """Bi-level routing with padding hidden (``"masked"``) or zero after projection (``"nchw"``), token by token."""
    _, height, width, dim = x.shape
    masked = module.pad_mode == "masked"
    h, w = ((-(-s // module.n_win) if masked else max(1, s // module.n_win)) for s in (height, width))
    qkv = module.qkv_linear(x)
    cells = {}
    for y in range(height):
        for c in range(width):
            cells.setdefault((y // h, c // w), []).append((y, c))
    names = sorted(cells)
    out = torch.zeros(x.shape, dtype=x.dtype)
    d = dim // module.num_heads
    for b in range(x.shape[0]):
        means = {r: torch.stack([qkv[b, y, c] for y, c in cells[r]]).mean(0) for r in names}
        for r in names:
            affinity = torch.stack([means[r][:dim] @ means[s][dim : 2 * dim] for s in names])
            chosen = [names[i] for i in affinity.topk(min(module.topk, len(names))).indices.tolist()]
            tokens = torch.stack([qkv[b, y, c] for s in chosen for y, c in cells[s]])
            missing = 0 if masked else sum(h * w - len(cells[s]) for s in chosen)
            tokens = torch.cat([tokens, tokens.new_zeros(missing, 3 * dim)])
            for y, c in cells[r]:
                for head in range(module.num_heads):
                    part = slice(head * d, (head + 1) * d)
                    scores = tokens[:, dim : 2 * dim][:, part] @ qkv[b, y, c, :dim][part] * dim**-0.5
                    out[b, y, c, part] = scores.softmax(0) @ tokens[:, 2 * dim :][:, part]
    assert module.lepe is not None
    return module.output_linear(out + module.lepe(qkv[..., 2 * dim :]))


@pytest.mark.parametrize("pad_mode", ["masked", "nchw"])
@pytest.mark.parametrize("size", [(6, 6), (7, 5), (8, 11), (2, 3)])
def test_padding_modes_equal_a_loop_over_tokens(pad_mode: Any, size: tuple[int, int]) -> None:
    module = RoutedAttention(16, topk=3, n_win=3, head_dim=8, pad_mode=pad_mode).double()
    x = torch.randn(2, *size, 16, dtype=torch.float64)
    with torch.no_grad():
        assert relative(module(x), loops(module, x)) < 1e-12


def test_padding_modes_agree_where_nothing_is_padded() -> None:
    x = torch.randn(1, 12, 9, 16, dtype=torch.float64)
    outputs = []
    for pad_mode in ("legacy", "nchw", "masked"):
        torch.manual_seed(0)
        outputs.append(RoutedAttention(16, topk=2, n_win=3, head_dim=8, pad_mode=pad_mode).double()(x))
    assert relative(outputs[1], outputs[0]) < 1e-12
    assert relative(outputs[2], outputs[0]) < 1e-12


def test_masked_padding_makes_a_region_independent_of_what_lies_outside_the_image() -> None:
    module = RoutedAttention(16, topk=16, n_win=4, head_dim=8, pad_mode="masked", side_dwconv=0).double()
    legacy = RoutedAttention(16, topk=16, n_win=4, head_dim=8, side_dwconv=0).double()
    legacy.load_state_dict(module.state_dict())
    x = torch.randn(1, 7, 7, 16, dtype=torch.float64)
    q, k, v = module.qkv_linear(x).flatten(1, 2).unflatten(-1, (3, 2, 8)).permute(2, 0, 3, 1, 4)
    full = ((q @ k.transpose(-2, -1)) * 16**-0.5).softmax(-1) @ v  # every region is routed to: attention to all tokens
    expected = module.output_linear(full.transpose(1, 2).reshape(1, 7, 7, 16))
    assert relative(module(x), expected) < 1e-12
    assert relative(legacy(x), expected) > 1e-3


def test_auto_number_of_regions_is_seven_at_224_and_grows_with_the_image() -> None:
    auto = BiFormer(**{**SMALL, "n_win": "auto", "topks": (1, 4, 16, -2)}).eval().double()
    fixed = BiFormer(**{**SMALL, "n_win": 7, "topks": (1, 4, 16, -2)}).eval().double()
    fixed.load_state_dict(auto.state_dict())
    small, large = torch.randn(1, 3, 224, 224).double(), torch.randn(1, 3, 288, 288).double()
    with torch.no_grad():
        torch.testing.assert_close(auto(small), fixed(small), rtol=1e-12, atol=1e-12)
        assert not torch.allclose(auto(large), fixed(large))


@pytest.mark.parametrize("size", [(224, 224), (200, 264)])
def test_dense_maps_are_normed_on_the_way_out_only(size: tuple[int, int]) -> None:
    dense: Any = randomized(BiFormerDense("test_biformer", n_win=8)).eval()
    with torch.no_grad():
        x = torch.randn(1, 3, *size, dtype=torch.float64)
        maps = dense(x)
        plain = dense.forward_intermediates(x, intermediates_only=True)
    for level, (out, tap, norm) in enumerate(zip(maps, plain, dense.out_norms, strict=True)):
        assert out.shape[2:] == tuple(math.ceil(s / (4 << level)) for s in size)
        mean, var = tap.mean(1, keepdim=True), tap.var(1, unbiased=False, keepdim=True)
        expected = (tap - mean) / (var + 1e-6).sqrt() * norm.weight.view(-1, 1, 1) + norm.bias.view(-1, 1, 1)
        assert relative(out, expected) < 1e-10


def test_dense_training_keeps_batch_norm_frozen_unless_told_otherwise() -> None:
    def moves(**options: Any) -> bool:
        model = BiFormerDense("test_biformer", **options).train()
        before = model.stem[1].running_mean.clone()  # type: ignore[union-attr]
        model(torch.randn(2, 3, 64, 64))
        return not torch.equal(before, model.stem[1].running_mean)  # type: ignore[union-attr, arg-type]

    assert not moves()
    assert moves(norm_eval=False)
    frozen = BiFormerDense("test_biformer", freeze_norm=True)
    trainable = {name for name, p in frozen.named_parameters() if p.requires_grad}
    assert "stem.1.weight" not in trainable
    assert "stem.0.weight" in trainable
    assert frozen.eval() is frozen


# --- official checkpoints ---------------------------------------------------------------------------------------------

MODELS_OF_LAYOUT = {
    "biformer": lambda: BiFormer(**SMALL, num_classes=5, layer_scale_init_value=0.1, mlp_dwconv=True),
    "biformer_stl": lambda: BiFormer(**SMALL, num_classes=5, stem="patch", before_attn_dwconv=0),
    "biformer_stl_nchw": lambda: BiFormer(
        **SMALL, num_classes=5, stem="patch", before_attn_dwconv=0, pad_mode="nchw", lepe_source="value"
    ),
}


def official_state(model: BiFormer, layout: str) -> dict[str, Tensor]:
    """What the official class would save: its names, and 1×1 convolutions in the nchw code."""
    model_state = model.state_dict()
    state = {official: model_state[ours] for official, ours in official_names(model, KEY_MAP[layout]).items()}
    if layout == "biformer_stl_nchw":
        state = {
            name: value[:, :, None, None] if value.ndim == 2 and not name.startswith("head") else value
            for name, value in state.items()
        }
    return state


@pytest.mark.parametrize("layout", list(KEY_MAP))
@pytest.mark.parametrize(
    "wrap",
    [
        lambda s: s,
        lambda s: {"model": s, "epoch": 3, "args": argparse.Namespace(lr=1.0)},
        lambda s: {"state_dict": {f"module.{name}": value for name, value in s.items()}},
        lambda s: {"state_dict": {f"backbone.{k}": v for k, v in s.items()} | {"neck.weight": torch.ones(1)}},
    ],
    ids=["bare", "model", "state_dict and module.", "backbone. beside a neck"],
)
def test_official_weights_survive_the_round_trip(layout: str, wrap: Any, tmp_path: Path) -> None:
    source = MODELS_OF_LAYOUT[layout]()
    torch.manual_seed(1)
    target = MODELS_OF_LAYOUT[layout]()
    torch.save(wrap(official_state(source, layout)), tmp_path / "weights.pth")
    assert load_official(target, tmp_path / "weights.pth") is target
    target_state = target.state_dict()
    for name, value in source.state_dict().items():
        assert torch.equal(target_state[name], value), name


def test_official_names_look_as_published() -> None:
    names = official_names(BiFormer(**SMALL), KEY_MAP["biformer"])
    for name in (
        "downsample_layers.0.3.weight",
        "downsample_layers.2.1.running_var",
        "stages.0.0.attn.qkv.qkv.weight",
        "stages.0.0.attn.wo.bias",
        "stages.3.0.attn.qkv.weight",
        "stages.3.0.attn.proj.bias",
        "stages.1.0.mlp.3.weight",
        "stages.1.0.pos_embed.weight",
        "norm.running_mean",
        "head.weight",
    ):
        assert name in names, name


def test_averaged_weights_are_taken_on_request() -> None:
    source, target = BiFormer(**SMALL), BiFormer(**SMALL)
    averaged = official_state(source, "biformer")
    plain = {name: torch.zeros_like(value) for name, value in averaged.items()}
    load_official(target, {"model": plain, "model_ema": averaged}, ema=True)
    assert torch.equal(target.get_parameter("head.fc.weight"), source.get_parameter("head.fc.weight"))
    with pytest.raises(ValueError, match="has no averaged weights"):
        load_official(target, {"model": plain}, ema=True)


def test_dense_model_starts_from_a_classification_checkpoint() -> None:
    source: Any = create_model("test_biformer")
    dense = BiFormerDense("test_biformer")
    state = official_state(source, "biformer")
    with pytest.raises(ValueError, match=r"missing extra_norms.0.weight"):
        load_official(dense, state)
    load_official(dense, state, ignore=("head", "norm", "out_norms"))
    assert torch.equal(dense.stem[0].weight, source.stem[0].weight)  # type: ignore[union-attr]


def test_wrong_checkpoints_are_refused_with_the_keys_that_are_wrong(tmp_path: Path) -> None:
    model = BiFormer(**SMALL)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    state = official_state(BiFormer(**SMALL), "biformer")
    renamed = {("norm.wieght" if name == "norm.weight" else name): value for name, value in state.items()}
    with pytest.raises(ValueError, match=r"missing norm.weight \(there is norm.wieght\); unexpected norm.wieght"):
        load_official(model, renamed)
    with pytest.raises(ValueError, match=r"head.weight is \(5, 64\), the model has \(1000, 64\)"):
        load_official(model, official_state(BiFormer(**SMALL, num_classes=5), "biformer"))
    load_official(BiFormer(**SMALL), official_state(BiFormer(**SMALL, num_classes=5), "biformer"), ignore=("head",))
    with pytest.raises(ValueError, match=r"load_official: .*absent\.pth does not exist"):
        load_official(model, tmp_path / "absent.pth")
    with pytest.raises(ValueError, match="holds no weights"):
        load_official(model, {"model": {"epoch": 1}})
    (tmp_path / "text.pth").write_text("no checkpoint")
    with pytest.raises(ValueError, match="is not a checkpoint that loads safely"):
        load_official(model, tmp_path / "text.pth")
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name]), f"{name} changed by a refused checkpoint"


class Bomb:
    def __reduce__(self) -> tuple[Any, ...]:
        return (pytest.fail, ("code in a checkpoint was run",))


def test_code_in_a_checkpoint_is_not_run(tmp_path: Path) -> None:
    torch.save({"model": Bomb()}, tmp_path / "bomb.pth")
    with pytest.raises(ValueError, match="is not a checkpoint that loads safely"):
        load_official(BiFormer(**SMALL), tmp_path / "bomb.pth")


# --- errors -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"topks": (1, 4, 50, -2)}, r"topk must not exceed the n_win² = 49 regions, got topk=50"),
        ({"topks": (1, 4, -3, -2)}, r"topks must be positive, 0, -1 or -2"),
        ({"depths": (1, 1)}, r"depths must have one entry for each of 4 stages"),
        ({"head_dim": 24}, r"heads of width 24 must divide qk_dim=16"),
        ({"param_routing": True}, r"param_routing=True needs diff_routing=True"),
        ({"diff_routing": True}, r"diff_routing=True needs soft_routing=True"),
        ({"pad_mode": "same"}, r"pad_mode must be one of .* got pad_mode='same'"),
        ({"n_win": "seven"}, r"n_win must be one of .*'auto'.* got n_win='seven'"),
        ({"side_dwconv": 4}, r"side_dwconv must be odd"),
        ({"kv_downsample_mode": "conv"}, r"kv_downsample_mode must be one of"),
        ({"kv_downsample_mode": "avgpool", "pad_mode": "masked"}, r"kv_downsample_mode needs pad_mode='legacy'"),
        ({"dims": (16, 32, 32, 36), "head_dim": 4}, r"dim % 8 == 0, got dim=36"),
    ],
)
def test_contradicting_options_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        BiFormer(**{**SMALL, **options})


def test_without_auto_pad_a_map_that_does_not_divide_is_refused() -> None:
    model = BiFormer(**{**SMALL, "n_win": 7, "auto_pad": False}).eval()
    assert model(torch.randn(1, 3, 224, 224)).shape == (1, 1000)
    with pytest.raises(ValueError, match=r"a map of 50×56 tokens does not split into 7×7 regions; .* auto_pad=True"):
        model(torch.randn(1, 3, 200, 224))


def test_unknown_names_and_options_come_with_the_nearest_known_one() -> None:
    with pytest.raises(ValueError, match=r"unknown model 'biformer_tinny'; did you mean 'biformer_tiny'\?"):
        create_model("biformer_tinny")
    with pytest.raises(ValueError, match=r"has no option 'n_wins'; did you mean 'n_win'\?"):
        create_model("test_biformer", n_wins=7)
    with pytest.raises(ValueError, match=r"variant must be one of"):
        BiFormerDense("biformer_huge")


def test_peak_memory_of_routed_attention_does_not_grow_with_topk() -> None:
    from attn_core.testing import peak_memory

    def peak(topk: int) -> int:
        module = RoutedAttention(32, topk=topk, n_win=4, head_dim=16)
        x = torch.randn(1, 64, 64, 32)
        module(x).sum().backward()
        return peak_memory(lambda: module(x).sum().backward())

    assert peak(16) <= 1.1 * peak(1)
