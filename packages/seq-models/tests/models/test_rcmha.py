"""RCMHA and its three siblings: networks written out, official weights, what convolutions and tables do.

The official module and model (hermansh-id/rcmha) gave equal outputs, with and without memory, to 2e-15.
"""

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from seq_models.models import create_model, load_official
from seq_models.models.rcmha import KEY_MAP, RCMHAConfig, RelativeConvolutionalAttention, sinusoids

KINDS = ["mha", "mdha", "rmha", "rcmha"]


def filled(net: Any) -> Any:
    """Random numbers in all parameters, zeros of tables included."""
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.3)
    return net.double().eval()


def plain(state: dict[str, Tensor], ids: Tensor, config: RCMHAConfig) -> Tensor:
    """Logits of one row, pair by pair: no layer of the package, no operator."""

    def normed(x: Tensor, name: str) -> Tensor:
        x = x - x.mean(-1, keepdim=True)
        return x / (x.square().mean(-1, keepdim=True) + 1e-5).sqrt() * state[f"{name}.weight"] + state[f"{name}.bias"]

    def linear(x: Tensor, name: str) -> Tensor:
        return x @ state[f"{name}.weight"].T + state.get(f"{name}.bias", 0.0)

    n, heads, width = len(ids), config.num_attention_heads, config.head_dim
    x = state["model.embed_tokens.weight"][ids]
    if config.attention in ("mha", "mdha"):
        for t in range(n):
            for i in range(config.hidden_size // 2):
                angle = t / 10000 ** (2 * i / config.hidden_size)
                x[t, 2 * i] += math.sin(angle)
                x[t, 2 * i + 1] += math.cos(angle)
    for layer in range(config.num_hidden_layers):
        name = f"model.layers.{layer}"
        y, parts = normed(x, f"{name}.norm_self_attn"), []
        for part in ("query", "key", "value"):
            z = linear(y, f"{name}.self_attn.{part}").view(n, heads, width)
            if config.attention in ("mdha", "rcmha"):
                w, b = (state[f"{name}.self_attn.{part}_conv.conv.{t}"] for t in ("weight", "bias"))
                past = torch.cat([z.new_zeros(2, heads, width), z])
                z = sum(past[i : i + n] * w[:, 0, i] for i in range(3)) + b
            parts.append(z)
        q, k, v = parts
        out = torch.zeros_like(v)
        for h in range(heads):
            for i in range(n):
                seen = range(max(0, i - config.positions + 1), i + 1)
                scores = []
                for j in seen:
                    s = q[i, h] @ k[j, h]
                    if config.attention in ("rmha", "rcmha"):
                        tables = {t: state[f"{name}.self_attn.{t}"] for t in ("key_pos_embeddings", "key_pos_bias")}
                        r = config.positions + j - i
                        s = s + state[f"{name}.self_attn.query_pos_bias"][h] @ k[j, h]
                        s = s + q[i, h] @ tables["key_pos_embeddings"][r, h] + tables["key_pos_bias"][r, h]
                    scores.append(s / width**0.5)
                out[i, h] = torch.stack(scores).softmax(0) @ v[list(seen), h]
        x = x + linear(out.reshape(n, -1), f"{name}.self_attn.output")
        y = normed(x, f"{name}.norm_ff")
        x = x + linear(linear(y, f"{name}.feed_forward.layer1").clamp(min=0), f"{name}.feed_forward.layer2")
    return linear(normed(x, "model.norm"), "lm_head")


@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_the_whole_network_equals_a_plain_one_written_out(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = filled(create_model("test_rcmha", attention=kind))
    ids = torch.randint(0, 256, (17,))
    expected = plain(model.state_dict(), ids, model.config)
    for at_once in (256, 5):  # queries of which the relative terms are held
        monkeypatch.setattr("seq_models.models.rcmha.QUERIES_AT_ONCE", at_once)
        assert (model(ids[None]).logits[0] - expected).abs().max() < 1e-10
    state = model(ids[None, :9], use_cache=True).past_key_values
    assert (model(ids[None, 9:], past_key_values=state).logits[0] - expected[9:]).abs().max() < 1e-10


def test_gradients_equal_those_of_the_plain_network() -> None:
    model = filled(create_model("test_rcmha", num_hidden_layers=1))
    ids = torch.randint(0, 256, (9,))
    weights = {name: value.detach().clone().requires_grad_() for name, value in model.state_dict().items()}
    probe = torch.randn(9, 256).double()
    theirs = torch.autograd.grad((plain(weights, ids, model.config) * probe).sum(), list(weights.values()))
    (model(ids[None]).logits[0] * probe).sum().backward()
    ours = dict(model.named_parameters())
    for name, grad in zip(weights, theirs, strict=True):
        assert (ours[name].grad - grad).abs().max() < 1e-10, name


@torch.no_grad()
def test_an_identity_convolution_leaves_plain_relative_attention() -> None:
    rcmha, rmha = (filled(create_model("test_rcmha", attention=kind)) for kind in ("rcmha", "rmha"))
    rcmha.load_state_dict(rmha.state_dict(), strict=False)
    for name, parameter in rcmha.named_parameters():
        if "_conv." in name:
            parameter.zero_()
            if name.endswith("weight"):
                parameter[:, 0, 2] = 1
    ids = torch.randint(0, 256, (2, 15))
    assert (rcmha(ids).logits - rmha(ids).logits).abs().max() < 1e-10


@torch.no_grad()
def test_tables_of_zeros_leave_the_convolutions_alone() -> None:
    rcmha, mdha = (filled(create_model("test_rcmha", attention=kind, sinusoids=True)) for kind in ("rcmha", "mdha"))
    rcmha.load_state_dict(mdha.state_dict(), strict=False)
    ids = torch.randint(0, 256, (2, 15))
    assert (rcmha(ids).logits - mdha(ids).logits).abs().max() > 1e-3
    for layer in rcmha.model.layers:
        layer.self_attn.reset_parameters()
    assert (rcmha(ids).logits - mdha(ids).logits).abs().max() < 1e-10


@torch.no_grad()
def test_distances_read_the_rows_that_the_official_shift_gives_them() -> None:
    """A column of zeros behind M + N rows, read as M + N columns again: the last M belong to the keys."""
    queries, keys, reach = 4, 6, 9
    layer = RelativeConvolutionalAttention(RCMHAConfig(hidden_size=8, num_attention_heads=2, positions=reach)).double()
    for parameter in layer.parameters():
        parameter.normal_()
    q, k, v = (torch.randn(1, 2, n, 4).double() for n in (queries, keys, keys))
    rows = slice(reach - keys, reach + queries)
    term = torch.einsum("hid,rhd->ihr", q[0], layer.key_pos_embeddings[rows]) + layer.key_pos_bias[rows].T
    term = term.transpose(1, 2)  # (N, M + N, H)
    padded = torch.cat([term, torch.zeros(queries, 1, 2).double()], 1).view(keys + queries + 1, queries, 2)
    shifted = padded[:-1].reshape(queries, keys + queries, 2)[:, -keys:]
    scores = torch.einsum("hid,hjd->ijh", q[0] + layer.query_pos_bias[:, None], k[0]) + shifted
    ahead = torch.arange(keys) > torch.arange(queries)[:, None] + keys - queries
    weight = (scores / 2).masked_fill(ahead[..., None], -torch.inf).softmax(1)
    expected = torch.einsum("ijh,hjd->hid", weight, v[0])
    assert (layer.attend(q, k, v)[0] - expected).abs().max() < 1e-10


def test_official_names_are_read_and_counts_are_the_official_ones() -> None:
    official: Any = create_model("rcmha_shakespeare")
    assert sum(p.numel() for p in official.parameters()) == 7_496_897
    tables = sum(p.numel() for name, p in official.named_parameters() if "key_pos" in name)
    assert tables == 6 * 1_114_112
    assert sum(p.numel() for p in official.model.layers[0].self_attn.parameters()) == 1_180_224
    source, target = (filled(create_model("test_rcmha")).float() for _ in range(2))
    import re

    renamed = {}
    for name, value in source.state_dict().items():
        for old, new in KEY_MAP["rcmha"]:
            name = re.sub(old, new, name)
        renamed[name] = value
    assert {"src_embed.weight", "generator.bias", "transformer.layers.1.self_attn.query.1.conv.weight",
            "transformer.layers.0.self_attn.value.0.linear.bias", "transformer.layers.0.self_attn.query_pos_bias",
            "transformer.layers.0.feed_forward.layer1.weight", "transformer.norm.weight"} <= renamed.keys()  # fmt: skip
    with torch.no_grad():
        for parameter in target.parameters():
            parameter.zero_()
    load_official(target, renamed)
    target_state = target.state_dict()
    assert all(torch.equal(value, target_state[name]) for name, value in source.state_dict().items())


@torch.no_grad()
def test_the_state_stops_growing_at_what_is_still_read() -> None:
    model = filled(create_model("test_rcmha"))
    ids = torch.randint(0, 256, (1, 40))
    sizes = [model(ids[:, :n], use_cache=True).past_key_values.nbytes() for n in (3, 6, 7, 40)]
    rows = 3 * 2  # two unconvolved rows of queries, keys and values
    assert sizes == [2 * 8 * 32 * (2 * held + rows) for held in (3, 6, 6, 6)]
    one = filled(create_model("test_rcmha_mha", positions=1))
    assert one(ids, use_cache=True).past_key_values.nbytes() == 0


def test_sinusoids_are_vaswani_s() -> None:
    x = torch.zeros(1, 5, 6).double()
    found = sinusoids(3, x)
    assert found[2, 4] == pytest.approx(math.sin(5 / 10000 ** (4 / 6)))
    assert found[4, 1] == pytest.approx(math.cos(7.0))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"positions": 0}, "RCMHAConfig: positions must be at least 1, got positions=0"),
        ({"hidden_size": 5, "num_attention_heads": 1, "sinusoids": True}, "hidden_size must be even with sinusoids"),
    ],
)
def test_sizes_that_do_not_fit_are_named(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        RCMHAConfig(**options)
