"""TransNormerLLM: slopes, operator, mixers and the released checkpoints' shapes and names."""

import math
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from seq_models import load_official
from seq_models.models import create_model
from seq_models.models.transnormer import (
    VARIANTS,
    TransNormerConfig,
    TransNormerForCausalLM,
    layer_share,
    lightning_attention,
    slopes,
)

# What config.json of the 385M checkpoint says.
OFFICIAL = {
    "vocab_size": 64000,
    "decoder_embed_dim": 1024,
    "decoder_layers": 24,
    "decoder_attention_heads": 8,
    "hidden_dim": 1024,
    "glu_dim": 2816,
    "linear_use_lrpe_list": [1] + 23 * [0],
    "norm_type": "simplermsnorm",
    "linear_act_fun": "silu",
    "no_scale_embedding": False,
    "bias": False,
    "pad_token_id": 0,
}


@pytest.mark.parametrize(
    ("heads", "expected"),
    [
        (1, [2**-8]),
        (2, [2**-4, 2**-8]),
        (8, [2.0**-i for i in range(1, 9)]),
        (12, [2.0**-i for i in range(1, 9)] + [2.0 ** -(0.5 + i) for i in range(4)]),
    ],
)
def test_slopes_are_those_of_alibi(heads: int, expected: list[float]) -> None:
    assert slopes(heads) == pytest.approx(expected)


def test_last_layer_hardly_decays_and_one_layer_is_legal() -> None:
    assert layer_share(0, 24) == 1 + 1e-5
    assert layer_share(23, 24) == pytest.approx(1e-5)
    assert layer_share(0, 1) == 1 + 1e-5


def masked(q: Tensor, k: Tensor, v: Tensor, share: float) -> Tensor:
    """The operator with the decay as an N×N matrix."""
    n = q.shape[2]
    distance = torch.arange(n)[:, None] - torch.arange(n)
    rate = torch.tensor(slopes(q.shape[1]), dtype=torch.float64)[:, None, None] * share
    decay = torch.where(distance >= 0, torch.exp(-rate * distance.clamp(min=0)), 0.0)
    return ((q @ k.mT) * decay) @ v


@pytest.mark.parametrize(("heads", "tokens", "width"), [(1, 1, 4), (4, 33, 8), (12, 70, 5)])
def test_operator_equals_the_masked_product(heads: int, tokens: int, width: int) -> None:
    q, k, v = (torch.randn(2, heads, tokens, width).double() for _ in range(3))
    out, _ = lightning_attention(q, k, v, 0.7)
    torch.testing.assert_close(out, masked(q, k, v, 0.7), rtol=0, atol=1e-10)


def srms(x: Tensor) -> Tensor:
    return x / (x.square().mean(-1, keepdim=True) + 1e-6).sqrt()


@pytest.mark.parametrize("style", ["tnl", "example"])
def test_mixer_equals_a_plain_formulation(style: Any) -> None:
    """q, k and gate as published, LRPE by complex numbers, the decay as a matrix."""
    model = TransNormerForCausalLM(TransNormerConfig(**{**VARIANTS["test_transnormer"], "style": style})).double()
    mixer: Any = model.get_submodule("model.layers.0.token_mixer")
    heads, n = 4, 13
    x = torch.randn(2, n, 32).double()

    def split(t: Tensor) -> Tensor:
        return t.view(2, n, heads, -1).transpose(1, 2)

    if style == "tnl":
        q, k, v, u = (x @ mixer.qkvu_proj.weight.T).chunk(4, -1)
        q, k = split(F.silu(q)), split(F.silu(k))
        angle = mixer.lrpe.theta.double() * torch.arange(n).double()[:, None]
        q, k = (torch.polar(t.abs(), angle + math.pi * (t < 0).double()) for t in (q, k))
        q, k = (torch.cat([t.real, t.imag], -1) for t in (q, k))
        out = srms(masked(q, k, split(v), 1 + 1e-5).transpose(1, 2).flatten(2)) * u @ mixer.out_proj.weight.T
    else:
        q, k, v = (split(F.silu(x @ p.weight.T)) for p in (mixer.q_proj, mixer.k_proj, mixer.v_proj))
        out = F.layer_norm(masked(q, k, v, 1 + 1e-5).transpose(1, 2).flatten(2), (32,))
        gate = torch.sigmoid(x @ mixer.output_gate[0].weight.T @ mixer.output_gate[1].weight.T)
        out = out * gate @ mixer.o_proj.weight.T
    torch.testing.assert_close(mixer(x)[0], out, rtol=0, atol=1e-10)


def test_lrpe_products_depend_on_distance_alone() -> None:
    model = TransNormerForCausalLM(TransNormerConfig(**VARIANTS["test_transnormer"])).double()
    first, second = cast(Any, [model.get_submodule(f"model.layers.{layer}.token_mixer") for layer in (0, 1)])
    lrpe = first.lrpe
    q, k = torch.randn(1, 4, 1, 8).double(), torch.randn(1, 4, 1, 8).double()
    near, far = ((lrpe(q, 3 + s) * lrpe(k, s)).sum().detach() for s in (0, 500))
    assert abs(float(near - far)) < 1e-10
    assert float(lrpe.theta[0, 0, 0].detach()) == 1.0
    assert second.lrpe is None


def test_released_config_gives_released_names_and_count() -> None:
    with torch.device("meta"):
        model = TransNormerForCausalLM(TransNormerConfig.from_official(OFFICIAL))
        assert sum(p.numel() for p in create_model("transnormer_385m").parameters()) == 398_983_168 + 1024
    assert sum(p.numel() for p in model.parameters()) == 398_983_168 + 1024  # 1,024 angles of the first layer
    keys = {"model.embed_tokens.weight", "lm_head.weight", "model.layers.0.token_mixer.lrpe.theta"}
    for layer in range(24):
        mixer = {f"model.layers.{layer}.token_mixer.{name}.weight" for name in ("qkvu_proj", "out_proj")}
        keys |= mixer | {f"model.layers.{layer}.channel_mixer.{name}.weight" for name in ("l1", "l2", "l3")}
    assert set(model.state_dict()) == keys
    assert model.state_dict()["model.layers.0.token_mixer.lrpe.theta"].shape == (8, 1, 128)


def test_released_weights_load_from_a_file(tmp_path: Path) -> None:
    settings = TransNormerConfig(**VARIANTS["test_transnormer"])
    theirs = {key: torch.randn_like(value) for key, value in TransNormerForCausalLM(settings).state_dict().items()}
    theirs["lm_head.weight"] = theirs["model.embed_tokens.weight"]
    torch.save(theirs, tmp_path / "pytorch_model.bin")
    model = load_official(TransNormerForCausalLM(settings), tmp_path / "pytorch_model.bin")
    assert all(torch.equal(value, theirs[key]) for key, value in model.state_dict().items())
    del theirs["lm_head.weight"]  # tied weights are often stored once
    tied = load_official(TransNormerForCausalLM(settings), theirs, ignore=("lm_head",))
    assert torch.equal(tied.lm_head.weight, theirs["model.embed_tokens.weight"])


def test_official_config_is_read_or_refused() -> None:
    assert TransNormerConfig.from_official({**OFFICIAL, "glu_dim": -1}).glu_size == 1024
    assert TransNormerConfig.from_official({**OFFICIAL, "linear_use_lrpe_list": []}).lrpe_layers == 24 * [0]
    with pytest.raises(ValueError, match="from_official: norm_type must be 'simplermsnorm', got 'layernorm'"):
        TransNormerConfig.from_official({**OFFICIAL, "norm_type": "layernorm"})
    with pytest.raises(ValueError, match="from_official: config lacks vocab_size, decoder_embed_dim"):
        TransNormerConfig.from_official({})


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"mixer_size": 30},
            "TransNormerConfig: mixer_size must be a multiple of num_attention_heads=4, got mixer_size=30",
        ),
        ({"lrpe_layers": [1]}, "lrpe_layers must say 0 or 1 for each of num_hidden_layers=2"),
        ({"mixer_size": 64, "style": "example"}, "mixer_size must be hidden_size with style='example'"),
    ],
)
def test_sizes_that_do_not_fit_are_named(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        TransNormerConfig(**{**VARIANTS["test_transnormer"], **options})


@torch.no_grad()
def test_state_has_the_same_bytes_after_any_number_of_tokens() -> None:
    model = TransNormerForCausalLM(TransNormerConfig(**VARIANTS["test_transnormer"])).eval()
    sizes = {model(torch.randint(0, 256, (1, n)), use_cache=True).past_key_values.nbytes() for n in (1, 64, 1000)}
    assert len(sizes) == 1


def plain_logits(state: dict[str, Tensor], ids: Tensor, settings: TransNormerConfig) -> Tensor:
    """The whole network over one row, written out: nothing of the package's layers, no operator of the core."""
    heads, layers, n = settings.num_attention_heads, settings.num_hidden_layers, len(ids)
    table = state["model.embed_tokens.weight"]
    x = table[ids] * settings.hidden_size**0.5
    rate = torch.tensor([2.0 ** (-8 * (head + 1) / heads) for head in range(heads)]).double()  # heads: a power of two
    distance = (torch.arange(n)[:, None] - torch.arange(n)).double()
    for layer in range(layers):
        p = {k.removeprefix(f"model.layers.{layer}."): v for k, v in state.items() if f".layers.{layer}." in k}
        share = 1 - layer / (layers - 1) + 1e-5
        decay = torch.exp(-rate[:, None, None] * share * distance).masked_fill(distance < 0, 0.0)
        y = srms(x)
        if settings.style == "tnl":
            q, k, v, gate = (y @ p["token_mixer.qkvu_proj.weight"].T).chunk(4, -1)
            q, k = q * q.sigmoid(), k * k.sigmoid()
        else:
            q, k, v = (y @ p[f"token_mixer.{name}_proj.weight"].T for name in "qkv")
            q, k, v = (t * t.sigmoid() for t in (q, k, v))
            low = y @ p["token_mixer.output_gate.0.weight"].T
            gate = torch.sigmoid(low @ p["token_mixer.output_gate.1.weight"].T)
        q, k, v = (t.view(n, heads, -1).transpose(0, 1) for t in (q, k, v))
        if "token_mixer.lrpe.theta" in p:
            angle = p["token_mixer.lrpe.theta"] * torch.arange(n).double()[:, None]
            q, k = (torch.cat([t * angle.cos(), t * angle.sin()], -1) for t in (q, k))
        out = ((q @ k.mT * decay) @ v).transpose(0, 1).reshape(n, -1)
        if settings.style == "tnl":
            x = x + (gate * srms(out)) @ p["token_mixer.out_proj.weight"].T
        else:
            out = out - out.mean(-1, keepdim=True)
            out = out / (out.square().mean(-1, keepdim=True) + 1e-5).sqrt()
            out = out * p["token_mixer.norm.weight"] + p["token_mixer.norm.bias"]
            x = x + (out * gate) @ p["token_mixer.o_proj.weight"].T
        first, second, third = (p[f"channel_mixer.l{number}.weight"].T for number in (1, 2, 3))
        x = x + ((srms(x) @ first) * (srms(x) @ second)) @ third
    return srms(x) @ table.T


@pytest.mark.parametrize("name", ["test_transnormer", "test_transnormer_example"])
@torch.no_grad()
def test_the_whole_network_equals_one_written_out(name: str) -> None:
    settings = TransNormerConfig(**{**VARIANTS[name], "num_hidden_layers": 3})
    model = TransNormerForCausalLM(settings).double().eval()
    for parameter in model.parameters():  # far from their start, where an eps or a gate would not show
        parameter.add_(torch.randn_like(parameter) * (0.3 if parameter.ndim == 1 else 0.05))
    ids = torch.randint(0, 256, (11,))
    expected = plain_logits(model.state_dict(), ids, settings)
    assert (model(ids[None]).logits[0] - expected).abs().max() < 1e-10
    state = model(ids[None, :4], use_cache=True).past_key_values
    assert (model(ids[None, 4:], past_key_values=state).logits[0] - expected[4:]).abs().max() < 1e-10
