"""MambaOut against a plain network over the official names and against timm's; MambaIn's scan token by token."""

from collections.abc import Mapping
from typing import Any

import pytest
import timm
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from attn_core.weights import official_names
from vision_models import MambaOut, MambaOutDense, create_model, load_official
from vision_models.bench.mambaout import split
from vision_models.layers.state_space import STEPS, StateSpace, doubled
from vision_models.models.mambaout import KEY_MAP

PARAMETERS = {
    "mambaout_femto": 7_304_536,
    "mambaout_kobe": 9_141_208,
    "mambaout_tiny": 26_545_096,
    "mambaout_small": 48_488_072,
    "mambaout_base": 84_813_092,
    "mambaout_small_rw": 48_495_560,
    "mambaout_base_short_rw": 88_827_688,
    "mambaout_base_tall_rw": 86_481_448,
    "mambaout_base_wide_rw": 94_448_104,
    "mambaout_base_plus_rw": 101_656_552,
}
SMALL: dict[str, Any] = {"depths": (2, 2), "dims": (8, 12), "num_classes": 5}
TIMM: dict[str, Any] = {"act": "silu", "layer_scale": 0.5, "stem_norm": False, "down_norm_first": True,
                        "head_norm": False}  # fmt: skip
NETS: dict[str, dict[str, Any]] = {
    "official": {**SMALL, "conv_ratio": 0.75, "kernel_size": 5},
    "all convolved": {**SMALL, "conv_ratio": 2.0, "expansion": 2.0},
    "timm's own": {**SMALL, **TIMM, "expansion": 3.0},
    "ssm": {**SMALL, "ssm": True, "ssm_state": 3, "conv_ratio": 2.2},
}


class Plain:
    """The network as its official names spell it; every block by hand, the scan token by token."""

    def __init__(self, state: Mapping[str, Tensor], options: Mapping[str, Any]) -> None:
        self.state, self.options = state, options
        self.activation = F.silu if options.get("act") == "silu" else lambda x: x / 2 * (1 + torch.erf(x / 2**0.5))

    def linear(self, x: Tensor, name: str) -> Tensor:
        out = x @ self.state[f"{name}.weight"].T
        return out + self.state[f"{name}.bias"] if f"{name}.bias" in self.state else out

    def norm(self, x: Tensor, name: str) -> Tensor:
        if f"{name}.weight" not in self.state:
            return x
        x = x - x.mean(-1, keepdim=True)
        x = x / (x.square().mean(-1, keepdim=True) + 1e-6).sqrt()
        return x * self.state[f"{name}.weight"] + self.state[f"{name}.bias"]

    def halved(self, x: Tensor, name: str) -> Tensor:
        weight, bias = self.state[f"{name}.weight"], self.state[f"{name}.bias"]
        return F.conv2d(x.permute(0, 3, 1, 2), weight, bias, 2, 1).permute(0, 2, 3, 1)

    def convolved(self, x: Tensor, name: str) -> Tensor:
        kernel = self.state[f"{name}.weight"][:, 0]
        height, width, reach = x.shape[1], x.shape[2], kernel.shape[1]
        padded = F.pad(x, (0, 0, *(reach // 2,) * 4))
        windows = [padded[:, i : i + height, j : j + width] for i in range(reach) for j in range(reach)]
        return (torch.stack(windows, -1) * kernel.flatten(1)).sum(-1) + self.state[f"{name}.bias"]

    def scanned(self, x: Tensor, name: str, backwards: bool) -> Tensor:
        u = F.silu(x).flatten(1, 2)
        decay, skip = self.state[f"{name}.A_log"].exp(), self.state[f"{name}.D"]
        rank = self.state[f"{name}.dt_proj.weight"].shape[1]
        low, given, read = self.linear(u, f"{name}.x_proj").tensor_split([rank, rank + decay.shape[1]], 2)
        step = (1 + self.linear(low, f"{name}.dt_proj").exp()).log()
        out = torch.zeros_like(u)
        state = u.new_zeros(len(u), *decay.shape)
        for t in range(u.shape[1])[:: -1 if backwards else 1]:
            taken = (step[:, t] * u[:, t])[:, :, None] * given[:, t, None]
            state = torch.exp(-step[:, t, :, None] * decay) * state + taken
            out[:, t] = (state * read[:, t, None]).sum(2) + skip * u[:, t]
        return out.view(x.shape)

    def block(self, x: Tensor, name: str, number: int) -> Tensor:
        both = self.linear(self.norm(x, f"{name}.norm"), f"{name}.fc1")
        hidden, channels = both.shape[3] // 2, len(self.state[f"{name}.conv.bias"])
        gate, value = self.activation(both[..., :hidden]), both[..., hidden:]
        mixed = self.convolved(value[..., hidden - channels :], f"{name}.conv")
        if self.options.get("ssm"):
            mixed = self.scanned(mixed, f"{name}.ssm", number % 2 == 1)
        out = self.linear(gate * torch.cat([value[..., : hidden - channels], mixed], 3), f"{name}.fc2")
        return x + self.state.get(f"{name}.ls.gamma", 1.0) * out

    def __call__(self, image: Tensor) -> Tensor:
        name = "downsample_layers.0"
        x = self.norm(self.halved(image.permute(0, 2, 3, 1), f"{name}.conv1"), f"{name}.norm1")
        x = self.norm(self.halved(self.activation(x), f"{name}.conv2"), f"{name}.norm2")
        number = 0
        for stage, depth in enumerate(self.options["depths"]):
            name = f"downsample_layers.{stage}"
            if stage and self.options.get("down_norm_first"):
                x = self.halved(self.norm(x, f"{name}.norm"), f"{name}.conv")
            elif stage:
                x = self.norm(self.halved(x, f"{name}.conv"), f"{name}.norm")
            for block in range(depth):
                x = self.block(x, f"stages.{stage}.{block}", number)
                number += 1
        x = self.linear(self.norm(x.mean((1, 2)), "norm"), "head.fc1")
        x = self.norm(x / 2 * (1 + torch.erf(x / 2**0.5)), "head.norm")
        return self.linear(x, "head.fc2")


def _drawn(options: dict[str, Any], kind: Any = MambaOut) -> Any:
    model = kind(**options).double()
    for name, parameter in model.named_parameters():
        nn.init.normal_(parameter, mean=1.0 if "norm" in name and name.endswith("weight") else 0.0, std=0.3)
    return model


@pytest.mark.parametrize("name", PARAMETERS)
def test_parameter_counts_are_those_of_the_official_models(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    # on the meta device there is nothing to draw; torch takes most of the time to find out
    monkeypatch.setattr(timm.models.mambaout, "trunc_normal_", lambda *_, **__: None)
    theirs: Any = timm.create_model(name, device="meta")
    ours: Any = create_model(name, device="meta")
    assert sum(p.numel() for p in ours.parameters()) == PARAMETERS[name]
    shapes = [{key: tuple(value.shape) for key, value in net.state_dict().items()} for net in (ours, theirs)]
    assert shapes[0] == shapes[1]


@pytest.mark.parametrize(("name", "training"), [*((name, False) for name in NETS), ("official", True)])
def test_logits_and_gradients_equal_a_plain_network(name: str, training: bool) -> None:
    """Where nobody derives, the parts of a projection are computed apart: the same logits."""
    options = NETS[name]
    model = _drawn(options).train(training)
    names = official_names(model, KEY_MAP["mambaout"])
    x = torch.randn(2, 3, 19, 13, dtype=torch.float64)
    results: list[list[Tensor]] = []
    for plain in (False, True):
        image = x.clone().requires_grad_()
        own = dict(model.named_parameters())
        net = Plain({official: own[ours] for official, ours in names.items()}, options) if plain else model
        logits = net(image)
        grads = torch.autograd.grad(logits.square().mean(), [image, *own.values()])
        with torch.no_grad():
            results.append([logits, *grads, net(x)])
    for actual, expected in zip(*results, strict=True):
        assert (actual - expected).detach().abs().max() <= 1e-10 * max(1.0, expected.detach().abs().max().item())


@pytest.mark.parametrize("name", ["mambaout_femto", "mambaout_small_rw", "mambaout_base_plus_rw"])
def test_outputs_equal_timms_under_its_names(name: str) -> None:
    options: dict[str, Any] = {"depths": (1, 1, 1, 1), "dims": (8, 16, 16, 24), "num_classes": 5}
    theirs: Any = timm.create_model(name, **options).double().eval()
    for parameter in theirs.parameters():
        nn.init.normal_(parameter, std=0.3)
    ours: Any = create_model(name, **options).double().eval()
    load_official(ours, theirs.state_dict())
    x = torch.randn(2, 3, 51, 37, dtype=torch.float64)
    with torch.no_grad():
        torch.testing.assert_close(ours(x), theirs(x), rtol=0, atol=1e-10)


@pytest.mark.parametrize("name", NETS)
def test_official_checkpoints_make_the_round_trip(name: str) -> None:
    model, other = _drawn(NETS[name]), _drawn(NETS[name])
    model_state = model.state_dict()
    state = {n: model_state[ours] for n, ours in official_names(model, KEY_MAP["mambaout"]).items()}
    load_official(other, state)
    assert all(torch.equal(value, model_state[key]) for key, value in other.state_dict().items())


def test_official_names_look_as_published() -> None:
    names = official_names(MambaOut(**SMALL), KEY_MAP["mambaout"])
    stem = {f"downsample_layers.0.{layer}.bias" for layer in ("conv1", "norm1", "conv2", "norm2")}
    rest = {f"stages.{place}.weight" for place in ("0.0.norm", "1.0.fc1", "0.1.conv", "1.1.fc2")}
    rest |= {"downsample_layers.1.conv.weight", "downsample_layers.1.norm.bias", "norm.weight"}
    rest |= {"head.fc1.bias", "head.norm.weight", "head.fc2.weight"}
    assert stem | rest <= set(names)
    assert len(names) == 8 + 4 + 4 * 8 + 8


def test_fewer_convolved_channels_change_the_convolution_alone() -> None:
    shapes = [{n: tuple(p.shape) for n, p in MambaOut(**SMALL, conv_ratio=ratio).named_parameters()}
              for ratio in (1.0, 0.5)]  # fmt: skip
    changed = {name for name, shape in shapes[0].items() if shapes[1][name] != shape}
    assert changed == {name for name in shapes[0] if ".conv." in name and ".blocks." in name}


def test_what_hooks_the_first_projection_sees_and_changes_all_of_it() -> None:
    model = _drawn(NETS["official"]).eval()
    x = torch.randn(1, 3, 27, 21, dtype=torch.float64)
    with torch.no_grad():
        before = model(x)
        fc1 = model.stages[0].blocks[0].fc1
        seen: list[Tensor] = []
        with fc1.register_forward_hook(lambda _module, _inputs, out: seen.append(out)):
            torch.testing.assert_close(model(x), before, rtol=1e-10, atol=1e-10)
        with fc1.register_forward_pre_hook(lambda _module, inputs: (2 * inputs[0],)):
            assert not torch.allclose(model(x), before)
    assert seen[0].shape == (1, 7, 6, 2 * 21)


def test_scans_of_blocks_alternate_in_direction_and_join_all_tokens() -> None:
    """The convolution reaches one cell: what changes farther away in one pass came through the scan."""
    model = _drawn({**SMALL, "ssm": True, "kernel_size": 1, "ssm_state": 2})
    x = torch.randn(1, 5, 4, 8, dtype=torch.float64, requires_grad=True)
    for block, earlier in zip(model.stages[0].blocks, (True, False), strict=True):
        reached = torch.autograd.grad(block(x)[0, 2, 1].sum(), x)[0][0].abs().sum(2).flatten() > 0
        place = 2 * 4 + 1
        assert reached.tolist() == [cell <= place if earlier else cell >= place for cell in range(20)]


@pytest.mark.parametrize("tokens", [1, 2, 11])
@pytest.mark.parametrize("reverse", [False, True])
def test_the_exported_scan_computes_the_same(tokens: int, reverse: bool) -> None:
    module: Any = StateSpace(6, 3, reverse=reverse, dtype=torch.float64)
    x = torch.randn(2, 1, tokens, 6, dtype=torch.float64)
    program = torch.export.export(module, (x,)).module()
    torch.testing.assert_close(program(x), module(x), rtol=1e-10, atol=1e-12)
    assert not any("attn_core" in str(node.target) for node in program.graph.nodes)  # pyright: ignore[reportAttributeAccessIssue]
    parts = torch.randn(2, 2, 6, tokens), -torch.rand(6, 3), torch.randn(2, 2, 3, tokens), torch.ones(6)
    (u, step), (B, C) = parts[0].bfloat16(), parts[2].bfloat16()
    half = doubled(u, step, parts[1], B, C, parts[3], reverse)
    assert half.dtype == torch.bfloat16


def test_state_space_models_start_as_mambas_do() -> None:
    model: Any = MambaOut(**SMALL, ssm=True, conv_ratio=2.5)
    module = model.stages[1].blocks[0].ssm
    assert module.rank == 2
    torch.testing.assert_close(module.A_log.exp(), torch.arange(1.0, 17.0).expand(30, 16))
    assert module.D.eq(1).all()
    steps = F.softplus(module.dt_proj.bias.detach())
    assert steps.min() >= STEPS[0] * 0.999
    assert steps.max() <= STEPS[1] * 1.001
    assert 0.3 < module.dt_proj.weight.detach().abs().max().item() <= 2**-0.5


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", ["test_mambaout", "test_mambain"])
def test_half_precision_trains_with_finite_gradients(name: str, dtype: torch.dtype) -> None:
    model = create_model(name, dtype=dtype)
    x = torch.randn(2, 3, 32, 32, dtype=dtype)
    model(x).float().square().mean().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())
    with torch.no_grad():
        assert model.eval()(x).dtype == dtype


def test_the_official_formulation_of_the_benchmark_computes_the_same() -> None:
    for name in ("official", "timm's own"):
        model = _drawn(NETS[name]).eval()
        x = torch.randn(2, 3, 19, 13, dtype=torch.float64)
        with torch.no_grad():
            torch.testing.assert_close(split(model)(x), model(x), rtol=1e-10, atol=1e-10)
    with pytest.raises(ValueError, match="split: the official formulation has no state-space model; build with ssm"):
        split(_drawn(NETS["ssm"]))


def test_without_pooling_every_token_is_classified_in_its_place() -> None:
    head: Any = MambaOut(**SMALL, global_pool="").eval().head
    x = torch.randn(1, 12, 3, 5)
    with torch.no_grad():
        out = head(x)
        assert out.shape == (1, 5, 3, 5)
        torch.testing.assert_close(out[:, :, 1:2, 4:], head(x[:, :, 1:2, 4:]))


def test_a_dense_backbone_has_a_norm_for_each_map_and_no_head() -> None:
    model = MambaOutDense("test_mambaout")
    maps = model(torch.randn(1, 3, 50, 34))
    assert [tuple(m.shape) for m in maps] == [(1, 12, 13, 9), (1, 16, 7, 5), (1, 24, 4, 3), (1, 32, 2, 2)]
    assert not [name for name, _ in model.named_parameters() if name.startswith("head")]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"dims": (8, 12)}, r"depths and dims must have one entry for each stage, got \(3, 3, 9, 3\) and \(8, 12\)"),
        ({"act": "relu"}, "act must be 'gelu' or 'silu', got act='relu'"),
        ({"kernel_size": 4}, "kernel_size must be odd, got kernel_size=4"),
        ({"conv_ratio": 3.0}, r"conv_ratio must leave every stage between one channel and expansion=2.67 times"),
        ({"conv_ratio": 0.001}, "conv_ratio must leave every stage between one channel .*got conv_ratio=0.001"),
        ({"ssm_state": 0}, "ssm_state must be positive, got ssm_state=0"),
    ],
    ids=str,
)
def test_wrong_options_are_named(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        MambaOut(**options)
