"""TransNeXt and MoH-ViT against a plain network: windows and pooled cells are one list of keys of each token."""

import math
from collections.abc import Mapping
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from attn_core.composites import routed_heads as ways
from attn_core.nn import balance_losses
from attn_core.weights import official_names
from vision_models import TransNeXt, create_model, load_official
from vision_models.models.transnext import KEY_MAP

PARAMETERS = {
    "transnext_micro": 12_809_304,
    "transnext_micro_aaaa_256": 13_114_008,
    "transnext_tiny": 28_258_960,
    "transnext_small": 49_741_564,
    "transnext_base": 89_721_496,
    "moh_transnext_small_80": 49_910_548,
    "moh_transnext_small_75": 49_910_548,
    "moh_transnext_base_75": 90_020_632,
    "moh_transnext_base_50": 90_023_512,
}
TAKEN = {  # heads a token takes in each stage
    "moh_transnext_small_80": (3, 6, 9, 20),
    "moh_transnext_small_75": (3, 6, 9, 16),
    "moh_transnext_base_75": (4, 8, 12, 21),
    "moh_transnext_base_50": (4, 6, 8, 12),
}
SMALL: dict[str, Any] = {
    "depths": (1, 2, 1, 1), "embed_dims": (8, 12, 12, 16), "num_heads": (2, 3, 3, 4), "mlp_ratios": (2, 2, 3, 2),
    "sr_ratios": (4, 3, 1, 1), "num_classes": 5, "img_size": 64,
}  # fmt: skip
NETS: dict[str, dict[str, Any]] = {
    "plain": {**SMALL, "qkv_bias": False},
    "mixture": {**SMALL, "shared_heads": (2, 1, 0, 2), "routed_heads": (0, 1, 2, 1)},
}


class Plain:
    """The network as its official names spell it; every token with the list of keys that it sees."""

    def __init__(self, state: Mapping[str, Tensor], options: Mapping[str, Any]) -> None:
        self.state, self.options = state, options
        self.balance: list[Tensor] = []

    def linear(self, x: Tensor, name: str) -> Tensor:
        weight = self.state[f"{name}.weight"]
        out = x @ weight.flatten(1).T
        return out + self.state[f"{name}.bias"] if f"{name}.bias" in self.state else out

    def norm(self, x: Tensor, name: str, eps: float) -> Tensor:
        x = x - x.mean(-1, keepdim=True)
        x = x / (x.square().mean(-1, keepdim=True) + eps).sqrt()
        return x * self.state[f"{name}.weight"] + self.state[f"{name}.bias"]

    def convolved(self, x: Tensor, name: str, **options: Any) -> Tensor:
        weight, bias = self.state[f"{name}.weight"], self.state[f"{name}.bias"]
        return F.conv2d(x.permute(0, 3, 1, 2), weight, bias, **options).permute(0, 2, 3, 1)

    def gates(self, x: Tensor, name: str, shared: int, routed: int) -> Tensor:
        """(B, Y, X, heads)."""
        parts = []
        if shared:
            parts.append(
                shared * self.linear(x, f"{name}.wg_1").softmax(-1) if shared > 1 else torch.ones_like(x[..., :1])
            )
        if routed:
            p = self.linear(x, f"{name}.wg").softmax(-1)
            chosen = (p >= p.sort(-1).values[..., -routed, None]).to(p.dtype)
            parts.append(routed * p * chosen / (p * chosen).sum(-1, keepdim=True))
            self.balance.append(p.shape[-1] * (p.mean((0, 1, 2)) * chosen.mean((0, 1, 2))).sum())
        if shared and routed:
            weights = 2 * self.linear(x, f"{name}.wg_0").softmax(-1)
            parts = [parts[0] * weights[..., :1], parts[1] * weights[..., 1:]]
        return torch.cat(parts, -1)

    def bias(self, name: str, away: Tensor, side: int) -> Tensor:
        """(heads, M): for distances (M, 2) in cells."""
        near = away / (side - 1) * 8
        near = near.sign() * torch.log2(near.abs() + 1) / 3
        return self.linear(self.linear(near, f"{name}.cpb_fc1").clamp(min=0), f"{name}.cpb_fc2").T

    def attention(self, x: Tensor, name: str, stage: int) -> Tensor:
        batch, rows, columns, dim = x.shape
        heads, ratio = self.options["num_heads"][stage], self.options["sr_ratios"][stage]
        side = self.options["img_size"] // (4 << stage)

        def split(t: Tensor) -> Tensor:
            return t.unflatten(-1, (heads, -1))

        def unit(t: Tensor) -> Tensor:
            return t / t.norm(dim=-1, keepdim=True).clamp(min=1e-12)

        if ratio == 1:
            q, k, v = self.linear(x, f"{name}.qkv").chunk(3, -1)
            pooled_k, pooled_v = k, v
        else:
            q, (k, v) = self.linear(x, f"{name}.q"), self.linear(x, f"{name}.kv").chunk(2, -1)
            small = F.gelu(self.linear(x, f"{name}.sr")).permute(0, 3, 1, 2)
            small = F.adaptive_avg_pool2d(small, (max(rows // ratio, 1), max(columns // ratio, 1))).permute(0, 2, 3, 1)
            pooled_k, pooled_v = self.linear(self.norm(small, f"{name}.norm", 1e-5), f"{name}.kv").chunk(2, -1)
        q, k, v, pooled_k, pooled_v = unit(split(q)), unit(split(k)), split(v), unit(split(pooled_k)), split(pooled_v)
        sharp = F.softplus(self.state[f"{name}.temperature"][:, 0])
        high, wide = pooled_k.shape[1:3]
        middles = [
            F.adaptive_avg_pool1d(torch.arange(n, dtype=torch.float64)[None], m)[0]
            for n, m in ((rows, high), (columns, wide))
        ]
        out = torch.zeros(batch, rows, columns, heads, dim // heads, dtype=torch.float64)
        every: list[list[Tensor]] = []
        for i in range(rows):
            every.append([])
            for j in range(columns):
                window = [] if ratio == 1 else [
                    (a, b) for a in (i - 1, i, i + 1) for b in (j - 1, j, j + 1) if 0 <= a < rows and 0 <= b < columns
                ]  # fmt: skip
                cells = [(a, b) for a in range(high) for b in range(wide)]
                query = (q[:, i, j] + self.state[f"{name}.query_embedding"][:, 0]) * sharp
                query = query * math.log(len(window) + len(cells))
                slots = [3 * (a - i + 1) + b - j + 1 for a, b in window]
                keys = torch.stack([*(k[:, a, b] for a, b in window), *(pooled_k[:, a, b] for a, b in cells)], 2)
                values = torch.stack([*(v[:, a, b] for a, b in window), *(pooled_v[:, a, b] for a, b in cells)], 2)
                biases = [self.state[f"{name}.relative_pos_bias_local"][:, s] for s in slots]
                away = torch.tensor([i, j]) - torch.cartesian_prod(*middles).view(-1, 2)
                biases += [*self.bias(name, away, side).unbind(1)]
                weights = ((query[:, :, None] * keys).sum(-1) + torch.stack(biases, 1)).softmax(-1)
                if slots:
                    free = (q[:, i, j, :, :, None] * self.state[f"{name}.learnable_tokens"]).sum(2)
                    free = (free + self.state[f"{name}.learnable_bias"][:, 0])[..., slots]
                    weights = weights + F.pad(free, (0, len(cells)))
                every[-1].append((weights[..., None] * values).sum(2))
        out = torch.stack([torch.stack(row, 1) for row in every], 1)
        if self.options.get("shared_heads") is not None:
            shared, routed = self.options["shared_heads"][stage], self.options["routed_heads"][stage]
            out = out * self.gates(x, name, shared, routed)[..., None]
        return self.linear(out.flatten(3), f"{name}.proj")

    def __call__(self, image: Tensor) -> Tensor:
        x = image.permute(0, 2, 3, 1)
        for stage, depth in enumerate(self.options["depths"]):
            kernel, stride = (3, 2) if stage else (7, 4)
            x = self.convolved(x, f"patch_embed{stage + 1}.proj", stride=stride, padding=kernel // 2)
            x = self.norm(x, f"patch_embed{stage + 1}.norm", 1e-5)
            for number in range(depth):
                name = f"block{stage + 1}.{number}"
                x = x + self.attention(self.norm(x, f"{name}.norm1", 1e-6), f"{name}.attn", stage)
                gate, hidden = self.linear(self.norm(x, f"{name}.norm2", 1e-6), f"{name}.mlp.fc1").chunk(2, -1)
                gate = self.convolved(gate, f"{name}.mlp.dwconv.dwconv", padding=1, groups=gate.shape[3])
                x = x + self.linear(0.5 * gate * (1 + torch.erf(gate / 2**0.5)) * hidden, f"{name}.mlp.fc2")
            x = self.norm(x, f"norm{stage + 1}", 1e-6)
        return self.linear(x.mean((1, 2)), "head")


def _drawn(options: dict[str, Any]) -> Any:
    model = TransNeXt(**options).double()
    for name, parameter in model.named_parameters():
        nn.init.normal_(parameter, mean=1.0 if "norm" in name and name.endswith("weight") else 0.0, std=0.3)
    return model


@pytest.mark.parametrize("name", PARAMETERS)
def test_parameters_and_heads_are_those_of_the_official_models(name: str) -> None:
    model: Any = create_model(name, device="meta")
    assert sum(p.numel() for p in model.parameters()) == PARAMETERS[name]
    routers = [stage.blocks[0].attn.router for stage in model.stages]
    assert TAKEN.get(name, (None,) * 4) == tuple(r and r.num_shared + r.num_routed for r in routers)


@pytest.mark.parametrize("name", NETS)
def test_logits_balance_and_gradients_equal_a_plain_network(name: str) -> None:
    """The picture is odd: maps of 6×7, 3×4, 2×2 and 1×1, with pooled cells of unequal width in the first stage."""
    options = NETS[name]
    model = _drawn(options)
    own = dict(model.named_parameters())
    x = torch.randn(1, 3, 21, 27, dtype=torch.float64)
    results: list[list[Tensor]] = []
    for plain in (False, True):
        image = x.clone().requires_grad_()
        if plain:
            names = official_names(model, KEY_MAP["transnext"])
            net = Plain({official: own[ours] for official, ours in names.items()}, options)
            logits, balance = net(image), net.balance
        else:
            with balance_losses(model) as balance:
                logits = model(image)
        loss = logits.square().mean() + (torch.stack(balance).mean() if balance else 0)
        results.append([logits.detach(), *torch.autograd.grad(loss, [image, *own.values()])])
    for actual, expected in zip(*results, strict=True):
        assert (actual - expected).abs().max() <= 1e-9 * max(1.0, float(expected.abs().max()))


def test_the_ways_to_list_distances_of_pooled_cells_agree() -> None:
    """Cells of one width have a short table; the general one, which exported graphs hold, serves any width."""
    from vision_models.models import transnext

    for side, ratio in ((8, 4), (9, 3), (7, 3), (2, 4), (1, 8)):
        cells = transnext.pooled_side(side, ratio)
        found = []
        for exporting in (False, True):
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(torch.compiler, "is_exporting", lambda exporting=exporting: exporting)
                distances, number = transnext.steps(side, ratio, torch.device("cpu"))
            found.append(distances[number])
        middle = F.adaptive_avg_pool1d(torch.arange(side, dtype=torch.float32)[None], cells)[0]
        assert torch.equal(found[0], torch.arange(side)[:, None] - middle)
        assert torch.equal(found[1], found[0])
        means = transnext.pooling(side, cells, torch.zeros(1))
        torch.testing.assert_close(means @ torch.arange(side, dtype=torch.float32), middle)


def test_official_checkpoints_make_the_round_trip() -> None:
    for options in NETS.values():
        model, other = _drawn(options), _drawn(options)
        model_state = model.state_dict()
        state = {n: model_state[ours] for n, ours in official_names(model, KEY_MAP["transnext"]).items()}
        for name in state:
            if ".sr.weight" in name:  # a convolution of one cell there
                state[name] = state[name][:, :, None, None]
        load_official(other, state)
        assert all(torch.equal(value, model_state[key]) for key, value in other.state_dict().items())
    published = ("patch_embed1.proj.weight", "block2.1.attn.cpb_fc2.bias", "block1.0.mlp.dwconv.dwconv.weight",
                 "block3.0.attn.wg.weight", "block4.0.attn.wg_0.weight", "norm3.weight", "norm4.bias")  # fmt: skip
    assert set(published) <= set(state)  # pyright: ignore[reportPossiblyUnboundVariable]


def test_heads_that_are_off_are_skipped_where_all_tokens_see_each_other() -> None:
    model = _drawn(NETS["mixture"]).eval()
    x = torch.randn(2, 3, 70, 90, dtype=torch.float64)
    with torch.no_grad(), pytest.MonkeyPatch.context() as patch:
        expected = model(x)
        patch.setattr(ways, "SKIP_KEYS", 1)
        patch.setattr(ways, "SKIP_SHARE", 2.0)
        torch.testing.assert_close(model(x), expected, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_heads": (1, 2)}, r"num_heads must have one entry for each of 4 stages, got \(1, 2\)"),
        ({"sr_ratios": (8, 4, 2)}, "sr_ratios must have one entry for each of 4 stages"),
        ({"sr_ratios": (8, 4, 0, 1)}, "sr_ratios must be positive, got 0"),
        ({"num_heads": (5, 6, 12, 24)}, "num_heads must divide the width of its stage, got 5 and 72"),
        ({"img_size": 0}, "img_size must be positive, got img_size=0"),
        ({"routed_heads": 1}, "shared_heads and routed_heads go together, got None and 1"),
        ({"shared_heads": (1, 1), "routed_heads": (2, 2)}, r"must be one number or 4, got \(1, 1\) and \(2, 2\)"),
        ({"shared_heads": 1, "routed_heads": 3}, "num_routed must lie in 1…2, the heads that are not shared, got 3"),
    ],
    ids=str,
)
def test_wrong_options_are_named(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        TransNeXt(**options)
