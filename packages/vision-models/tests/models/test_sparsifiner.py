"""Sparsifiner against a plain network that masks all scores, and what its attention holds and leaves out."""

import math
from collections.abc import Mapping
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from attn_core.testing import peak_memory
from vision_models import DeiT, Sparsifiner, create_model, load_official
from vision_models.models import sparsifiner
from vision_models.models.sparsifiner import MaskPredictor, SparseAttention, kept_keys
from vision_models.tasks.sparsifiner import SparsifinerTask, attention_maps

PARAMETERS = {"sparsifiner_tiny": 5_918_632, "sparsifiner_small": 22_251_880}
SMALL: dict[str, Any] = {
    "depth": 2, "embed_dim": 24, "num_heads": 3, "num_classes": 7, "img_size": 24, "patch_size": 4, "in_chans": 2,
    "rank": 11,
}  # fmt: skip


class Plain:
    """The network as its official names spell it: dense guesses, a mask over all scores."""

    def __init__(self, state: Mapping[str, Tensor], keep: float) -> None:
        self.state, self.keep = state, keep
        self.guesses: list[Tensor] = []
        self.attention_maps: list[Tensor] = []

    def linear(self, x: Tensor, name: str) -> Tensor:
        return x @ self.state[f"{name}.weight"].T + self.state[f"{name}.bias"]

    def norm(self, x: Tensor, name: str) -> Tensor:
        x = x - x.mean(-1, keepdim=True)
        x = x / (x.square().mean(-1, keepdim=True) + 1e-6).sqrt()
        return x * self.state[f"{name}.weight"] + self.state[f"{name}.bias"]

    def mask(self, q: Tensor, k: Tensor, name: str) -> Tensor:
        """(B, H, 1 + N, 1 + N): the largest of the thresholded guess in each row, and the whole first row."""
        name = f"{name}.mask_predictor"
        low_q, low_k = self.linear(q, f"{name}.proj_c_q"), self.linear(k, f"{name}.proj_c_k")
        summaries = torch.einsum("bhnc,nr->bhrc", low_k, self.state[f"{name}.proj_n"])
        coefficients = torch.softmax(low_q @ summaries.transpose(2, 3) / 3**0.5, -1)
        back = self.state[f"{name}.proj_back_n"]
        self.guesses.append((coefficients @ back.T)[:, :, 1:])
        eighth = coefficients.sort(-1, descending=True).values[..., 7:8]
        coefficients = coefficients * (coefficients >= eighth)
        size = back.abs()
        guess = coefficients @ (size * (size > 0.02)).T
        count = math.ceil(self.keep * guess.shape[-1])
        mask = guess >= guess.sort(-1, descending=True).values[..., count - 1 : count]
        assert (mask.sum(-1) == count).all()  # no ties
        mask[:, :, 0] = True
        return mask

    def attention(self, x: Tensor, name: str) -> Tensor:
        q, k, v = (t.unflatten(-1, (3, 8)).transpose(1, 2) for t in self.linear(x, f"{name}.qkv").chunk(3, -1))
        scores = q @ k.transpose(2, 3) / 8**0.5
        self.attention_maps.append(scores.softmax(-1))
        if self.keep < 1:
            scores = scores.masked_fill(~self.mask(q, k, name), -torch.inf)
        return self.linear((scores.softmax(-1) @ v).transpose(1, 2).flatten(2), f"{name}.proj")

    def __call__(self, image: Tensor) -> Tensor:
        weight, bias = self.state["patch_embed.proj.weight"], self.state["patch_embed.proj.bias"]
        x = F.conv2d(image, weight, bias, stride=4).flatten(2).transpose(1, 2)
        x = torch.cat([self.state["cls_token"].expand(len(x), -1, -1), x], 1) + self.state["pos_embed"]
        for i in range(2):
            x = x + self.attention(self.norm(x, f"blocks.{i}.norm1"), f"blocks.{i}.attn")
            hidden = self.linear(self.norm(x, f"blocks.{i}.norm2"), f"blocks.{i}.mlp.fc1")
            x = x + self.linear(0.5 * hidden * (1 + torch.erf(hidden / 2**0.5)), f"blocks.{i}.mlp.fc2")
        return self.linear(self.norm(x, "norm")[:, 0], "head")


def _drawn(keep: float = 0.25, kind: Any = Sparsifiner, **options: Any) -> Any:
    settings = {**SMALL, **options}
    if kind is Sparsifiner:
        settings["keep"] = keep
    else:
        settings.pop("rank")
    model = kind(**settings).double()
    for name, parameter in model.named_parameters():
        std = 0.05 if name.endswith(("proj_n", "proj_back_n")) else 0.3
        nn.init.normal_(parameter, mean=1.0 if "norm" in name and name.endswith("weight") else 0.0, std=std)
    return model


def _with_gradients(net: Any, image: Tensor, wanted: list[Tensor]) -> list[Tensor]:
    logits = net(image)
    grads = torch.autograd.grad(logits.square().mean(), [image, *wanted], allow_unused=True)
    return [logits.detach(), *(torch.zeros_like(w) if g is None else g for w, g in zip([image, *wanted], grads))]  # noqa: B905


@pytest.mark.parametrize("name", PARAMETERS)
def test_parameter_counts_are_those_of_the_official_models(name: str) -> None:
    assert sum(p.numel() for p in create_model(name, device="meta").parameters()) == PARAMETERS[name]


@pytest.mark.parametrize("chunk", [1, 2**19], ids=["one query at a time", "all at once"])
@pytest.mark.parametrize("keep", [0.25, 0.6, 1.0])
def test_logits_and_gradients_equal_a_plain_network(keep: float, chunk: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sparsifiner, "CHUNK_ELEMENTS", chunk)
    model = _drawn(keep)
    own = dict(model.named_parameters())
    x = torch.randn(2, 2, 24, 24, dtype=torch.float64)
    results = [
        _with_gradients(net, x.clone().requires_grad_(), list(own.values())) for net in (model, Plain(own, keep))
    ]
    for name, actual, expected in zip(["logits", "image", *own], *results, strict=True):
        assert (actual - expected).abs().max() <= 1e-10 * max(1.0, float(expected.abs().max())), name


def test_guesses_and_their_gradients_are_those_of_all_keys() -> None:
    model, x = _drawn(), torch.randn(2, 2, 24, 24, dtype=torch.float64)
    own = dict(model.named_parameters())
    plain = Plain(own, 0.999)  # all but one key: the scores of the next block are those of the dense one
    plain.mask_of = plain.mask  # type: ignore[attr-defined]
    plain.mask = lambda *args: torch.ones_like(plain.mask_of(*args))  # type: ignore[attr-defined, method-assign]
    plain(x)
    results = []
    for found in (model.guesses(x), plain.guesses):
        total = sum((g * torch.arange(g.numel()).view_as(g)).sum() for g in found)
        grads = torch.autograd.grad(total, [own[n] for n in own if "predictor" in n or "qkv" in n])  # type: ignore[arg-type]
        results.append([*(g.detach() for g in found), *grads])
    for actual, expected in zip(*results, strict=True):
        assert (actual - expected).abs().max() <= 1e-10 * max(1.0, float(expected.abs().max()))


def test_lists_of_keys_through_block_attention_give_the_same() -> None:
    """The way of a GPU, on the CPU."""
    attn: Any = SparseAttention(24, 3, (6, 6), 0.25, 11, 2, qkv_bias=True).double()
    for parameter in attn.parameters():
        nn.init.normal_(parameter, std=0.3)
    x = torch.randn(2, 37, 24, dtype=torch.float64)
    q, k, v = (t.detach().requires_grad_() for t in attn.projected(x))
    expected = attn.sparse(q, k, v, (6, 6))[:, :, 1:]
    predictor: MaskPredictor = attn.mask_predictor
    kept = kept_keys(predictor.coefficients(q, k, (6, 6)), predictor.bases((6, 6)), 10)
    actual = attn._through_lists(q, k, v, kept)
    weight = torch.randn_like(expected)
    for a, b in zip(
        [actual, *torch.autograd.grad((actual * weight).sum(), (q, k, v))],
        [expected, *torch.autograd.grad((expected * weight).sum(), (q, k, v))],
        strict=True,
    ):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12)


def _peak(side: int, keep: float, *, train: bool) -> float:
    """MiB above the projections that attention holds for side² patches."""
    attn: Any = SparseAttention(16, 2, (side, side), keep, 16, 2, qkv_bias=True)
    x = torch.randn(1, side * side + 1, 16)
    q, k, v = (t.detach().requires_grad_(train) for t in attn.projected(x))

    def run() -> None:
        out = attn.sparse(q, k, v, (side, side))
        if train:
            out.sum().backward()

    run()
    return peak_memory(run) / 2**20


def test_memory_grows_with_the_keys_that_are_kept_and_scores_of_all_pairs_are_never_held(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(sparsifiner, "CHUNK_ELEMENTS", 2**14)
    tokens = 28 * 28 + 1
    every = 2 * tokens**2 * 4 / 2**20  # 4.7 MiB
    kept = 2 * tokens**2 * 0.25 * 2 / 2**20  # int16 lists of a quarter of the keys, which training keeps
    few = _peak(28, 32 / tokens, train=True)
    assert few < every / 3
    assert _peak(28, 0.25, train=False) < every / 3
    assert _peak(28, 0.25, train=True) < few + 1.5 * kept


def test_tables_of_another_image_size_are_stretched_along_the_tokens() -> None:
    model, larger = _drawn(), _drawn(img_size=40)
    load_official(larger, model.state_dict())
    for small, large in zip(model.blocks, larger.blocks, strict=True):
        before, after = small.attn.mask_predictor, large.attn.mask_predictor
        assert after.proj_n.shape == (101, 11)
        cells = before.proj_back_n[1:].T.unflatten(1, (6, 6))[None]
        expected = F.interpolate(cells, (10, 10), mode="bicubic")[0].flatten(1).T
        torch.testing.assert_close(after.proj_back_n[1:], expected)
        torch.testing.assert_close(after.proj_back_n[0], before.proj_back_n[0])
        torch.testing.assert_close(after.proj_n[0] * 101 / 37, before.proj_n[0])
    x = torch.randn(1, 2, 40, 40, dtype=torch.float64)
    torch.testing.assert_close(model(x), larger(x), rtol=1e-9, atol=1e-9)


def test_weights_of_deit_load_and_a_network_that_keeps_all_is_deit() -> None:
    teacher, student = _drawn(kind=DeiT), _drawn(keep=1.0)
    load_official(student, teacher.state_dict(), ignore=tuple(f"blocks.{i}.attn.mask_predictor" for i in range(2)))
    x = torch.randn(1, 2, 24, 24, dtype=torch.float64)
    torch.testing.assert_close(student(x), teacher(x), rtol=1e-10, atol=1e-12)
    maps = Plain(dict(teacher.named_parameters()), 1.0)
    maps(x)
    for actual, expected in zip(attention_maps(teacher, x), maps.attention_maps, strict=True):
        torch.testing.assert_close(actual, expected, rtol=1e-9, atol=1e-12)


def test_the_task_first_fits_guesses_and_then_distills() -> None:
    teacher, student = _drawn(kind=DeiT), _drawn()
    task = SparsifinerTask(student, teacher=teacher, guess_steps=1).train()
    assert torch.equal(student.pos_embed, teacher.pos_embed)
    batch = {"image": torch.randn(3, 2, 24, 24, dtype=torch.float64), "label": torch.arange(3)}
    first = task(mode="loss", **batch)
    maps, guesses = attention_maps(teacher, batch["image"]), student.guesses(batch["image"])
    expected = sum(((g - m[:, :, 1:]) ** 2).sum() for g, m in zip(guesses, maps, strict=True)) / 2
    assert set(first) == {"loss_guess"}
    torch.testing.assert_close(first["loss_guess"], 0.01 * expected)
    second = task(mode="loss", **batch)
    with torch.no_grad():
        theirs, ours = teacher.forward_features(batch["image"]), student.forward_features(batch["image"])
        s, t = (net.forward_head(x).float().log_softmax(1) for net, x in ((student, ours), (teacher, theirs)))
    torch.testing.assert_close(second["loss_classes"], 0.5 * (t.exp() * (t - s)).sum(1).mean())
    torch.testing.assert_close(second["loss_tokens"], 0.5 * (theirs[:, 1:] - ours[:, 1:]).square().mean().float())
    torch.testing.assert_close(second["loss"], F.nll_loss(s, batch["label"]))
    assert not any(p.requires_grad for p in teacher.parameters())


def test_a_teacher_without_weights_is_trained_before_and_hands_them_on() -> None:
    teacher, student = _drawn(kind=DeiT), _drawn()
    task = SparsifinerTask(student, teacher=teacher, teacher_steps=1, guess_steps=1, mixup=0.2).train()
    batch = {"image": torch.randn(3, 2, 24, 24, dtype=torch.float64), "label": torch.arange(3)}
    assert set(task(mode="loss", **batch)) == {"loss_teacher"}
    assert not torch.equal(student.pos_embed, teacher.pos_embed)
    assert set(task(mode="loss", **batch)) == {"loss_guess"}
    assert torch.equal(student.pos_embed, teacher.pos_embed)
    state = task.state_dict()
    again = SparsifinerTask(_drawn(), teacher=_drawn(kind=DeiT), teacher_steps=1, guess_steps=1)
    again.load_state_dict(state)
    assert set(again(mode="loss", **batch)) == {"loss", "loss_classes", "loss_tokens"}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"keep": 0.0}, r"keep must lie in \(0, 1\], got keep=0.0"),
        ({"rank": 0}, "rank must be positive, got rank=0"),
        ({"reduce": 65}, "reduce must lie in 1…64, the width of a head, got reduce=65"),
    ],
    ids=str,
)
def test_wrong_options_are_named(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=f"Sparsifiner: {message}"):
        Sparsifiner(**options)
