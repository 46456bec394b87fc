"""ACMIL against plain networks with keys and values of every instance, padded batches, pieces, and what is masked."""

import argparse
import math
import sys
import types
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from attn_core.testing import peak_memory
from medical_seg.models import create_model, load_official
from medical_seg.models.acmil import (
    ABMIL,
    ACMIL,
    ACMILMultiHead,
    BagNetwork,
    MaxPooling,
    MeanPooling,
    bag_loss,
    diversity,
    mask_most_attended,
)

NAMES = ["acmil_ga", "acmil_mha", "abmil", "mean_pooling", "max_pooling"]


def plain_gated(state: dict[str, Tensor], x: Tensor, branches: int) -> tuple[Tensor, Tensor, Tensor]:
    """One bag (N, C) through the equations of ACMIL-GA: logits of branches, of the bag, and of the attention."""
    h = torch.clamp(x @ state["dimreduction.fc1.weight"].T, min=0)
    gates = [
        f(h @ state[f"attention.attention_{which}.0.weight"].T + state[f"attention.attention_{which}.0.bias"])
        for which, f in (("V", torch.tanh), ("U", torch.sigmoid))
    ]
    weights, bias = state["attention.attention_weights.weight"], state["attention.attention_weights.bias"]
    logits = torch.stack([(gates[0] * gates[1]) @ weights[k] + bias[k] for k in range(branches)])
    maps = torch.exp(logits) / torch.exp(logits).sum(1, keepdim=True)
    found = [
        state[f"classifier.{k}.fc.weight"] @ (maps[k] @ h) + state[f"classifier.{k}.fc.bias"] for k in range(branches)
    ]
    bag = state["Slide_classifier.fc.weight"] @ (maps.mean(0) @ h) + state["Slide_classifier.fc.bias"]
    return torch.stack(found), bag, logits


def plain_heads(state: dict[str, Tensor], x: Tensor, branches: int, heads: int) -> tuple[Tensor, Tensor, Tensor]:
    """One bag through ACMIL-MHA, with a key and a value for every instance, branch and head."""
    h = torch.clamp(x @ state["dimreduction.fc1.weight"].T, min=0)

    def linear(name: str, value: Tensor) -> Tensor:
        return value @ state[f"{name}.weight"].T + state[f"{name}.bias"]

    def normed(name: str, value: Tensor) -> Tensor:
        centered = value - value.mean()
        scaled = centered / torch.sqrt(centered.square().mean() + 1e-6)
        return scaled * state[f"{name}.weight"] + state[f"{name}.bias"]

    width = h.shape[1]
    every, found = [], []
    for k in range(branches):
        at = f"sub_attention.{k}"
        q = linear(f"{at}.q_proj", state["q"][0, k]).view(heads, -1)
        keys, values = (linear(f"{at}.{name}", h).view(len(h), heads, -1) for name in ("k_proj", "v_proj"))
        logits = torch.stack([keys[:, a] @ q[a] for a in range(heads)]) / math.sqrt(width / heads)
        maps = logits.softmax(1)
        joined = torch.cat([maps[a] @ values[:, a] for a in range(heads)])
        out = normed(f"{at}.layer_norm", linear(f"{at}.out_proj", joined))
        found.append(linear(f"classifier.{k}.fc", out))
        every.append(logits)
    maps = torch.stack(every).softmax(-1).mean(0)
    values = linear("bag_attention.v_proj", h).view(len(h), heads, -1)
    joined = torch.cat([maps[a] @ values[:, a] for a in range(heads)])
    bag = normed("bag_attention.layer_norm", linear("bag_attention.out_proj", joined))
    return torch.stack(found), linear("Slide_classifier.fc", bag), torch.stack(every)


def network(name: str, **options: Any) -> Any:
    torch.manual_seed(0)
    model: Any = create_model(name, in_channels=12, out_channels=3, width=16, **options).double()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.3)
    return model


@pytest.mark.parametrize(("name", "branches"), [("acmil_ga", 3), ("acmil_ga", 1), ("acmil_mha", 3), ("acmil_mha", 1)])
def test_outputs_and_gradients_equal_the_plain_network(name: str, branches: int) -> None:
    options = {"heads": 4} if name == "acmil_mha" else {}
    model = network(name, branches=branches, **options).eval()
    x = torch.randn(9, 12, dtype=torch.float64)
    state = {key: value.detach().clone().requires_grad_() for key, value in model.state_dict().items()}
    plain = plain_gated(state, x, branches) if name == "acmil_ga" else plain_heads(state, x, branches, 4)
    ours = model(x[None])
    attention = ours.attention[0, :, 0] if name == "acmil_ga" else ours.attention[0]
    for a, b in zip((ours.branches[0], ours.logits[0], attention), plain, strict=True):
        assert torch.allclose(a, b, rtol=0, atol=1e-12)
    (ours.logits.square().sum() + ours.branches.pow(3).sum()).backward()
    (plain[1].square().sum() + plain[0].pow(3).sum()).backward()
    for key, parameter in model.named_parameters():
        assert torch.allclose(parameter.grad, state[key].grad, rtol=1e-9, atol=1e-11), key  # pyright: ignore[reportArgumentType]


def test_the_loss_and_its_gradients_equal_the_plain_ones() -> None:
    model = network("acmil_mha", branches=3, heads=4).eval()
    x, label = torch.randn(9, 12, dtype=torch.float64), torch.tensor([2])
    state = {key: value.detach().clone().requires_grad_() for key, value in model.state_dict().items()}
    branches, bag, logits = plain_heads(state, x, 3, 4)
    maps = logits.softmax(-1)
    pairs = [(0, 1), (0, 2), (1, 2)]
    cosines = [(maps[a] * maps[b]).sum(-1) / maps[a].norm(dim=-1) / maps[b].norm(dim=-1) for a, b in pairs]
    own = [-branches.log_softmax(1)[:, 2].mean(), -bag.log_softmax(0)[2], torch.stack(cosines).mean()]
    losses = bag_loss(model(x[None]), label)
    found = [losses[f"loss_{name}"] for name in ("branches", "bag", "diversity")]
    for a, b in zip(found, own, strict=True):
        assert abs(a.item() - b.item()) < 1e-12
    torch.stack(found).sum().backward()
    torch.stack(own).sum().backward()
    for key, parameter in model.named_parameters():
        assert torch.allclose(parameter.grad, state[key].grad, rtol=1e-9, atol=1e-11), key  # pyright: ignore[reportArgumentType]


@pytest.mark.parametrize("name", NAMES)
def test_a_padded_batch_equals_one_bag_after_the_other(name: str) -> None:
    model = network(name)
    sizes = (1, 7, 20, 4)
    features = torch.randn(4, 20, 12, dtype=torch.float64) * 100  # what stands behind a bag must not matter
    mask = torch.arange(20) < torch.tensor(sizes)[:, None]
    label = torch.tensor([0, 2, 1, 1])
    model.eval()
    whole = model(features, mask)
    importance = model.importance(whole)
    together: Any = sum(bag_loss(whole, label).values())
    gradients = torch.autograd.grad(together, list(model.parameters()), allow_unused=True)
    parts = [model(features[k : k + 1, :n]) for k, n in enumerate(sizes)]
    for k, n in enumerate(sizes):
        assert torch.allclose(whole.logits[k], parts[k].logits[0], atol=1e-11)
        assert torch.allclose(whole.branches[k], parts[k].branches[0], atol=1e-11)
        assert torch.allclose(importance[k, :n], model.importance(parts[k])[0], atol=1e-12)
        assert importance[k, n:].abs().max() == 0 if n < 20 else True
    alone: Any = sum(sum(bag_loss(part, label[k : k + 1]).values()) for k, part in enumerate(parts)) / 4
    expected = torch.autograd.grad(alone, list(model.parameters()), allow_unused=True)
    for a, b in zip(gradients, expected, strict=True):
        assert (a is None) == (b is None)
        assert a is None or torch.allclose(a, b, rtol=1e-8, atol=1e-9)  # pyright: ignore[reportArgumentType]


@pytest.mark.parametrize("name", NAMES)
def test_a_bag_in_pieces_equals_the_whole(name: str) -> None:
    model = network(name).eval()
    x = torch.randn(50, 12, dtype=torch.float64) * 3
    whole, parts = model(x[None]), model.stream(x.split(7))
    for a, b in zip(whole, parts, strict=True):
        assert torch.allclose(a, b, atol=1e-11)


@pytest.mark.parametrize("name", ["acmil_ga", "acmil_mha", "max_pooling"])
def test_a_hundred_thousand_instances_take_the_memory_of_their_attention(name: str) -> None:
    """Not of features (16 MB here), nor of keys (13 MB a branch)."""
    torch.manual_seed(0)
    model: Any = create_model(name, in_channels=40, width=32).eval()
    piece = torch.randn(1000, 40)
    held = peak_memory(lambda: model.stream(piece for _ in range(100)))
    rows = {"acmil_ga": 5, "acmil_mha": 40, "max_pooling": 2}[name]
    assert held < 2.5 * rows * 100_000 * 4 + 4e6  # the logits, once in parts and once joined


def test_six_of_the_ten_most_attended_are_masked_in_every_branch_and_have_no_weight() -> None:
    model = network("acmil_mha", branches=3, heads=4, mask_drop=0.6)
    x = torch.randn(2, 30, 12, dtype=torch.float64)
    seen = model.eval()(x).attention
    masked = model.train()(x).attention
    hidden = masked == -1e9
    assert (hidden.sum(-1) == 6).all()
    top = torch.zeros_like(hidden).scatter(-1, seen.topk(10).indices, True)
    assert (hidden <= top).all()
    assert torch.equal(masked[~hidden], seen[~hidden])
    assert masked.softmax(-1)[hidden].max() == 0
    assert not torch.equal(hidden, model(x).attention == -1e9)  # another draw
    off = network("acmil_mha", branches=3, heads=4).train()(x).attention
    assert (off > -1e8).all()  # the default masks nothing


def test_short_bags_in_a_batch_lose_their_own_share() -> None:
    logits = torch.randn(3, 2, 1, 12)
    mask = torch.arange(12) < torch.tensor([12, 5, 1])[:, None]
    hidden = mask_most_attended(logits.masked_fill(~mask[:, None, None], -torch.inf), mask, 10, 0.6) == -1e9
    assert hidden.sum(-1).squeeze(-1).tolist() == [[6, 6], [3, 3], [0, 0]]
    assert (mask_most_attended(logits, None, 4, 0.5) == -1e9).sum(-1).unique().tolist() == [2]
    every = mask_most_attended(logits[:, :, :, :3], None, 10, 1.0)
    assert torch.allclose(every.softmax(-1), torch.full((), 1 / 3))  # masked whole: all alike, not NaN


def test_masking_is_uniform_over_the_most_attended() -> None:
    logits = torch.arange(20.0).expand(4000, 1, 1, 20)
    rate = (mask_most_attended(logits, None, 10, 0.6) == -1e9).float().mean((0, 1, 2))
    assert rate[:10].max() == 0
    assert (rate[10:] - 0.6).abs().max() < 0.04


def test_one_branch_is_abmil() -> None:
    one, abmil = network("acmil_ga", branches=1).eval(), network("abmil").eval()
    state = one.state_dict()
    names = {f"classifier.fc.{key}": f"Slide_classifier.fc.{key}" for key in ("weight", "bias")}
    abmil.load_state_dict({key: state[names.get(key, key)] for key in abmil.state_dict()})
    x = torch.randn(2, 9, 12, dtype=torch.float64)
    assert torch.allclose(one(x).logits, abmil(x).logits, atol=1e-13)
    assert list(bag_loss(abmil(x), torch.tensor([0, 1]))) == ["loss_bag"]
    assert list(bag_loss(one(x), torch.tensor([0, 1]))) == ["loss_bag"]


def test_diversity_is_one_for_equal_maps_and_none_for_disjoint_ones() -> None:
    equal = torch.randn(2, 1, 3, 8).expand(2, 4, 3, 8)
    assert diversity(equal).item() == pytest.approx(1, abs=1e-6)
    apart = torch.full((1, 3, 1, 3), -50.0)
    apart[0, :, 0].fill_diagonal_(0.0)
    assert diversity(apart).item() < 1e-6


def test_pooling_takes_the_mean_and_the_largest() -> None:
    x = torch.randn(1, 9, 12, dtype=torch.float64)
    for kind, pool in ((MeanPooling, lambda v: v.mean(0)), (MaxPooling, lambda v: v.max(0).values)):
        model = network("mean_pooling" if kind is MeanPooling else "max_pooling").eval()
        state = model.state_dict()
        h = torch.clamp(x[0] @ state["dimreduction.fc1.weight"].T, min=0)
        each = h @ state["classifier.fc.weight"].T + state["classifier.fc.bias"]
        output = model(x)
        assert torch.allclose(output.logits[0], pool(each), atol=1e-12)
        best = int(output.logits.argmax())
        assert torch.allclose(model.importance(output)[0], each.softmax(1)[:, best], atol=1e-12)


def test_importance_is_the_mean_map_of_branches_and_heads() -> None:
    model = network("acmil_mha", branches=3, heads=4).eval()
    output = model(torch.randn(2, 9, 12, dtype=torch.float64))
    expected = output.attention.softmax(-1).flatten(1, 2).mean(1)
    assert torch.allclose(model.importance(output), expected, atol=1e-14)
    assert torch.allclose(expected.sum(1), torch.ones(2, dtype=torch.float64))


@pytest.mark.parametrize(
    ("channels", "classes", "gated", "heads"),
    [
        (384, 2, 84_369, 416_140),
        (512, 2, 200_593, 1_585_932),
        (768, 3, 401_047, 3_560_850),
        (1024, 2, 662_417, 6_317_580),
        (1536, 2, 1_386_385, 14_194_956),
    ],
)
def test_parameters_of_all_encoders(channels: int, classes: int, gated: int, heads: int) -> None:
    with torch.device("meta"):
        for kind, count in ((ACMIL, gated), (ACMILMultiHead, heads)):
            assert sum(p.numel() for p in kind(channels, classes).parameters()) == count
        assert sum(p.numel() for p in ACMIL(384, branches=1).parameters()) == 82_821
        assert sum(p.numel() for p in ABMIL(384).parameters()) == 82_563
        assert ABMIL(100).width == 56  # half, in eights


def test_official_names_are_ours_and_settings_of_the_authors_class_are_no_code(tmp_path: Path) -> None:
    """Their checkpoints hold an object of ``utils.utils.Struct``, which does not exist here."""
    model = create_model("acmil_ga", in_channels=12, width=8, branches=2)
    assert set(model.state_dict()) == {
        "dimreduction.fc1.weight",
        *(f"attention.attention_{g}.0.{k}" for g in "VU" for k in ("weight", "bias")),
        *(f"{name}.{k}" for name in ("attention.attention_weights", "Slide_classifier.fc") for k in ("weight", "bias")),
        *(f"classifier.{branch}.fc.{k}" for branch in (0, 1) for k in ("weight", "bias")),
    }
    heads = create_model("acmil_mha", in_channels=12, width=8, branches=2)
    projections = [f"sub_attention.1.{n}_proj.weight" for n in "qkv"] + ["bag_attention.out_proj.bias", "q"]
    assert {*projections, "sub_attention.0.layer_norm.bias", "classifier.1.fc.bias"} <= set(heads.state_dict())
    assert not any(name.startswith("bag_attention.k") for name in heads.state_dict())
    theirs = types.ModuleType("utils.utils")
    theirs.Struct = type("Struct", (argparse.Namespace,), {"__module__": "utils.utils"})  # type: ignore[attr-defined]
    sys.modules |= {"utils": types.ModuleType("utils"), "utils.utils": theirs}
    try:
        held = {"model": model.state_dict(), "epoch": 3, "config": theirs.Struct(D_feat=12, lr=1e-4)}
        torch.save(held, tmp_path / "checkpoint-best.pth")
    finally:
        del sys.modules["utils"], sys.modules["utils.utils"]
    other = load_official(
        create_model("acmil_ga", in_channels=12, width=8, branches=2), tmp_path / "checkpoint-best.pth"
    )
    other_state = other.state_dict()
    assert all(torch.equal(value, other_state[name]) for name, value in model.state_dict().items())
    with pytest.raises(ValueError, match=r"does not fit this ACMIL: .*classifier\.2"):
        load_official(create_model("acmil_ga", in_channels=12, width=8, branches=3), tmp_path / "checkpoint-best.pth")
    kept = create_model("acmil_ga", in_channels=12, width=8, branches=2, out_channels=5)
    load_official(kept, tmp_path / "checkpoint-best.pth", ignore=("classifier", "Slide_classifier"))
    assert torch.equal(kept.get_parameter("dimreduction.fc1.weight"), model.get_parameter("dimreduction.fc1.weight"))


def test_queries_begin_at_nothing_and_dropout_acts_in_training() -> None:
    model: Any = create_model("acmil_mha", in_channels=12, width=16, heads=4)
    assert 0 < model.q.abs().max() < 1e-5
    x = torch.randn(1, 9, 12)
    for name, options in (("acmil_mha", {"dropout": 0.5}), ("acmil_ga", {"dropout": 0.5}), ("abmil", {"dropout": 0.5})):
        net: Any = create_model(name, in_channels=12, width=16, **options)
        assert not torch.equal(net(x).logits, net(x).logits)
        assert torch.equal(net.eval()(x).logits, net(x).logits)


def test_half_precision_masks_and_sums_in_float32() -> None:
    model: Any = create_model("acmil_ga", in_channels=12, width=16, mask_drop=0.6).to(torch.bfloat16)
    output = model(torch.randn(1, 30, 12, dtype=torch.bfloat16))
    assert output.attention.dtype == torch.float32
    assert ((output.attention == -1e9).sum(-1) == 6).all()
    assert all(torch.isfinite(loss) for loss in bag_loss(output, torch.tensor([1])).values())


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: ACMIL(0), "in_channels, out_channels and width must be at least 1, got 0, 2 and 0"),
        (lambda: ACMIL(8, mask_drop=1.5), "0 ≤ mask_drop ≤ 1, got 5, 10 and 1.5"),
        (lambda: ACMIL(8, branches=0), "expected branches ≥ 1"),
        (lambda: ACMILMultiHead(8, width=12), "heads=8 do not divide width=12"),
        (lambda: ABMIL(8)(torch.zeros(3, 8)), r"ABMIL: expected features \(B N C\), got shape \(3, 8\)"),
        (lambda: ABMIL(8)(torch.zeros(1, 3, 9)), "the network reads 8 features, got 9"),
        (lambda: ABMIL(8)(torch.zeros(1, 0, 8)), "at least one instance, got none"),
        (lambda: ABMIL(8).stream([]), "at least one instance, got none"),
        (lambda: MaxPooling(8).stream([]), "at least one instance, got none"),
        (lambda: ABMIL(8)(torch.zeros(1, 3, 8), torch.ones(1, 3)), "mask must be bool of shape"),
        (
            lambda: ABMIL(8)(torch.zeros(2, 3, 8), torch.tensor([[True] * 3, [False] * 3])),
            "bag 1 of the batch has no instance",
        ),
    ],
)
def test_mistakes_are_named(make: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()


def test_networks_of_bags_are_told_from_those_of_images() -> None:
    assert isinstance(create_model("test_acmil"), BagNetwork)
    loss = F.cross_entropy(create_model("test_acmil")(torch.randn(1, 3, 8)).logits, torch.tensor([0]))
    assert loss.isfinite()
