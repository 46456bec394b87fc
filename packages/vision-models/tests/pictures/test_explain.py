"""Pictures of attention: what they show is what the networks compute, and every family has one."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor, nn

from vision_models import create_model, list_models
from vision_models.layers.token_pooling import attention_of
from vision_models.pictures.explain import draw, panels_of, stages
from vision_models.pictures.explain.davit import channel_matrix, window_attention
from vision_models.pictures.explain.dhvt import attention_of as head_attention
from vision_models.pictures.explain.focalnet import gates_and_modulator
from vision_models.pictures.explain.frozen_llm import attention_of as language_attention
from vision_models.pictures.explain.halonet import window_attention as halo_window
from vision_models.pictures.explain.mambaout import gates_and_neighbors
from vision_models.pictures.explain.mixture_of_heads import gates_of
from vision_models.pictures.explain.nat import token_attention
from vision_models.pictures.explain.panel import brightness, enlarged, inputs_of, spread, token_at
from vision_models.pictures.explain.pooling import attention_rows
from vision_models.pictures.explain.ravlt import key_weights
from vision_models.pictures.explain.spectformer import taps_around
from vision_models.pictures.explain.spectformer import token_attention as spectformer_attention

SMALL = [name for name in list_models() if name.startswith("test_")]


def _scores() -> list[tuple[str, float]]:
    return [("cat", 0.9), ("dog", 0.1)]


@pytest.mark.parametrize("name", SMALL)
def test_every_family_draws_a_picture(name: str, tmp_path: Path) -> None:
    net = create_model(name).eval()
    picture = Image.fromarray(np.linspace(0, 255, 30 * 45 * 3).reshape(30, 45, 3).astype(np.uint8))
    image = torch.randn(3, 75, 113)
    draw(net, image, picture, _scores(), (0.1, 0.9), tmp_path / "a.png")
    assert np.asarray(Image.open(tmp_path / "a.png").convert("L")).std() > 10
    if name == "test_biformer":  # how panels become a picture is the same for all; what they show is asked below
        draw(net, image, picture, _scores(), (0.9, 0.2), tmp_path / "b.png")
        draw(net, image, picture, _scores(), (0.1, 0.9), tmp_path / "c.png")
        first, second, again = ((tmp_path / f"{letter}.png").read_bytes() for letter in "abc")
        assert first == again != second


@pytest.mark.parametrize("name", SMALL)
def test_panels_follow_the_point_in_lights_and_frames_that_meet_the_map(name: str) -> None:
    net: Any = create_model(name).eval()
    panels: Any = panels_of(net)
    image = torch.randn(3, 75, 113)
    with torch.no_grad():
        columns, others = (panels(net, image, point) for point in ((1.0, 1.0), (0.9, 0.2)))
    shown = [panel for column in columns for panel in column]
    moved = [
        a.frames != b.frames or not torch.equal(a.light, b.light)
        for a, b in zip(shown, (panel for column in others for panel in column), strict=True)
    ]
    assert any(moved)
    for panel in shown:
        assert 0 <= float(panel.light.min()) <= float(panel.light.max()) <= 1 + 1e-6
        rows, width = panel.light.shape
        for top, left, _, _ in panel.frames:
            assert top < rows
            assert left < width


def test_unknown_networks_and_nothing_to_show_are_named(tmp_path: Path) -> None:
    picture = Image.new("RGB", (4, 4))
    with pytest.raises(ValueError, match=r"explain.draw: no picture is known for Linear; pass --no-explain"):
        draw(nn.Linear(1, 1), torch.zeros(3, 8, 8), picture, _scores(), (0, 0), tmp_path / "x.png")
    net = create_model("test_biformer", topks=(-2, -2, -2, -2)).eval()
    with pytest.raises(ValueError, match="this BiFormer has no block that attends"):
        draw(net, torch.zeros(3, 64, 64), picture, _scores(), (0, 0), tmp_path / "x.png")


def test_families_without_a_file_of_their_own_show_the_lengths_of_tokens() -> None:
    net = create_model("test_davit").eval()
    image = torch.randn(3, 75, 113)
    with torch.no_grad():
        columns = stages.panels(net, image, (1.0, 0.0))
        last: Any = net.forward_intermediates(image[None], intermediates_only=True)[-1]
    (panel,) = columns[-1]
    assert [len(column) for column in columns] == [1, 1, 1, 1]
    assert panel.frames == [(last.shape[2] - 1, 0, 1, 1)]
    longest = last[0].square().sum(0).argmax()
    assert panel.light.flatten()[longest].item() == pytest.approx(1)


def test_points_pictures_and_stages_are_picked_as_documented() -> None:
    assert token_at((1.0, 0.0), (5, 7)) == (4, 0)
    assert token_at((0.5, 0.5), (5, 7)) == (2, 3)
    assert enlarged(Image.new("L", (10, 8))).shape == (256, 320, 3)
    assert brightness(torch.tensor([[-1.0, 0.0, 2.0]])).tolist() == [pytest.approx([0.15, 0.15, 1.0])]
    assert spread(12, 4) == [2, 5, 8, 11]
    assert spread(3, 4) == [0, 1, 2]


def _seen(net: nn.Module, kind: str, size: tuple[int, int] = (75, 113)) -> tuple[Any, Tensor, Tensor]:
    """The first module of a class, what it was given and what it returned."""
    module: Any = next(m for m in net.modules() if type(m).__name__ == kind)
    with torch.no_grad():
        x = inputs_of(net, [module], torch.randn(3, *size, dtype=torch.float64))[module]
        return module, x, module(x)


@pytest.mark.parametrize("kind", ["neighborhood", "softmax"])
def test_nat_pictures_show_the_gradient_of_the_output_by_the_values(kind: str) -> None:
    """With values of one channel the output of a token is the sum of them, weighted by what the picture shows."""
    net: Any = create_model("test_dinat_s", num_heads=(1, 1, 1, 1), attention=kind, img_size=75).double().eval()
    attn = net.stages[1].blocks[1].attn
    x = torch.randn(1, 9, 11, 24, dtype=torch.float64)
    values = torch.zeros(1, 9, 11, 72, dtype=torch.float64, requires_grad=True)
    attn.qkv.register_forward_hook(lambda _module, _inputs, out: out + values)
    attn.proj = nn.Identity()
    seen = torch.autograd.grad(attn(x)[0, 2, 7, 0], values)[0][0, :, :, 48]
    with torch.no_grad():
        torch.testing.assert_close(token_attention(attn, x, 2, 7), seen)


def test_pictures_of_a_mixture_show_where_a_head_reaches_the_output() -> None:
    """A routed head is dark at the tokens whose output does not depend on its values."""
    net: Any = create_model("test_moh_vit").eval()
    image = torch.randn(3, 96, 96)
    gates = gates_of(net, [net.blocks[0].attn.router], image)[net.blocks[0].attn.router]
    x = inputs_of(net, [net.blocks[0].attn], image)[net.blocks[0].attn]
    attn = net.blocks[0].attn
    with torch.no_grad():
        whole = attn(x)[0]
        for head in range(attn.num_heads):
            saved = attn.proj.weight.clone()
            attn.proj.weight.view(48, 4, 12)[:, head] = 0
            changed = (attn(x)[0] != whole).any(1)
            attn.proj.weight.copy_(saved)
            assert torch.equal(changed, gates[:, head] > 0)
    column = panels_of(net)(net, image, (0.5, 0.5))[0]  # type: ignore[misc]
    assert [panel.title for panel in column][:1] == [
        f"block 1: head 3, {100 * (gates[1:, 2] > 0).float().mean():.0f} % of tokens"
    ]
    lit = column[0].light > column[0].light.min() + 1e-6
    assert torch.equal(lit.flatten(), gates[1:, 2] > 0)


def test_pictures_of_language_layers_show_the_weights_of_their_values() -> None:
    """With values of one channel the output of a token is the sum of them, weighted by what the picture shows."""
    net: Any = create_model("test_vit_llama").double().eval()
    layer, x, _ = _seen(net, "LlamaAttention", (64, 96))
    values = torch.zeros_like(x, requires_grad=True)
    layer.wv.register_forward_hook(lambda _module, _inputs, out: out + values)
    layer.wo = nn.Identity()
    out = layer(x)[0, 5].unflatten(0, (layer.num_heads, -1))[:, 0].mean()
    by_head = torch.autograd.grad(out, values)[0][0].unflatten(1, (layer.num_heads, -1))[..., 0].sum(1)
    torch.testing.assert_close(language_attention(layer, x, 5), by_head)


@pytest.mark.parametrize("name", ["test_tap_rvt", "test_tap_fan"])
def test_pictures_of_pooling_show_its_weights_and_the_attention_behind_it(name: str) -> None:
    net: Any = create_model(name).double().eval()
    image = torch.randn(3, 64, 64, dtype=torch.float64)
    block = net.stages[1].blocks[0] if name == "test_tap_rvt" else net.blocks[0]
    with torch.no_grad():
        columns: Any = panels_of(net)(net, image, (0.9, 0.1))  # type: ignore[misc]
        reach, attention = columns[1 if name == "test_tap_rvt" else 0]
        x = inputs_of(net, [block.pooling], image)[block.pooling]
        weights = block.pooling.weights(x)[0]
        mean = (weights * torch.arange(4.0)).sum(2).float()
        torch.testing.assert_close(reach.light, 0.15 + 0.85 * mean / 3)
        pooled = block.norm1(block.pooling(x))
        pooled = pooled if name == "test_tap_rvt" else pooled.flatten(1, 2)
        with attention_of(block) as seen:
            block.attn(pooled)
        rows = attention_rows(seen[0])
    row, column = token_at((0.9, 0.1), attention.light.shape)
    torch.testing.assert_close(
        attention.light, brightness(rows[row * len(attention.light[0]) + column].view(mean.shape))
    )
    assert reach.frames == attention.frames == [(row, column, 1, 1)]


@pytest.mark.parametrize("head_tokens", [True, False])
def test_dhvt_pictures_reproduce_the_outputs_of_its_attention(head_tokens: bool) -> None:
    net = create_model("test_dhvt", head_tokens=head_tokens).double().eval()
    attn, x, out = _seen(net, "HeadTokenAttention")
    with torch.no_grad():
        seen = head_attention(attn, x)
        tokens = attn.with_head_tokens(x) if head_tokens else x
        values = attn.qkv(tokens)[0, :, 2 * x.shape[2] :].unflatten(1, (attn.num_heads, -1))
        rebuilt = attn.proj(torch.einsum("hnm,mhd->nhd", seen, values).flatten(1))
    torch.testing.assert_close(rebuilt[1 : x.shape[1]], out[0, 1:])
    merged = rebuilt[0] + (rebuilt[x.shape[1] :].mean(0) if head_tokens else 0)
    torch.testing.assert_close(merged, out[0, 0])


def test_mambaout_pictures_show_all_that_a_token_takes_in() -> None:
    """The neighbors' parts and the gated bias are what the gate lets through of the convolved channels."""
    block, x, _ = _seen(create_model("test_mambaout").double().eval(), "GatedConvBlock")
    let_through: list[Tensor] = []
    with torch.no_grad(), block.fc2.register_forward_pre_hook(lambda _module, inputs: let_through.append(inputs[0])):
        block(x)
        for row, column in ((0, 0), (7, 11), (x.shape[1] - 1, 3)):
            gates, parts = gates_and_neighbors(block, x, row, column)
            convolved = parts.shape[2]
            expected = let_through[0][0, row, column, -convolved:] - gates[row, column, -convolved:] * block.conv.bias
            torch.testing.assert_close(parts.sum((0, 1)), expected)
            outside = parts[: max(3 - row, 0)]
            assert not outside.any()


@pytest.mark.parametrize("size", [(96, 96), (75, 113)], ids=str)
def test_spectformer_pictures_show_the_gradient_of_a_tokens_output(size: tuple[int, int]) -> None:
    """Of the gate by its input; of attention by values of one channel, of which it takes the mean that it shows."""
    net: Any = create_model("test_spectformer", num_heads=1).double().eval()
    gate, x, _ = _seen(net, "SpectralGate", size)
    x = x.clone().requires_grad_()
    seen = torch.autograd.grad(gate(x)[0, 2, 3].sum(), x)[0][0]
    torch.testing.assert_close(taps_around(gate, 2, 3, (x.shape[1], x.shape[2])).detach(), seen)
    attn, x, _ = _seen(net, "Attention", size)
    values = torch.zeros(*x.shape[:3], 3 * x.shape[3], dtype=torch.float64, requires_grad=True)
    attn.qkv.register_forward_hook(lambda _module, _inputs, out: out + values)
    attn.proj = nn.Identity()
    seen = torch.autograd.grad(attn(x)[0, 2, 3, 0], values)[0][0, :, :, 2 * x.shape[3]]
    with torch.no_grad():
        torch.testing.assert_close(spectformer_attention(attn, x, 2, 3), seen)


def test_davit_pictures_reproduce_the_outputs_of_its_attention() -> None:
    net = create_model("test_davit").double().eval()
    attn, x, out = _seen(net, "ChannelAttention")
    q = attn.qkv(x).view(1, -1, 3, attn.num_heads, x.shape[3] // attn.num_heads)[0, :, 0]
    rebuilt = torch.einsum("hde,nhe->nhd", channel_matrix(attn, x), q).reshape(x.shape)
    torch.testing.assert_close(attn.proj(rebuilt), out)
    attn, x, out = _seen(net, "WindowAttention")
    attn.num_heads = 1  # one head: the mean over heads is its attention
    with torch.no_grad():
        attention, (top, left) = window_attention(attn, x, (0.5, 0.5))
        value = nn.functional.pad(x, (0, 0, 0, 4, 0, 4))[0, top : top + 4, left : left + 4]
        value = attn.qkv(value)[..., 2 * x.shape[3] :]
        row, column = token_at((0.5, 0.5), (x.shape[1], x.shape[2]))
        torch.testing.assert_close(
            attn.proj(torch.einsum("yx,yxc->c", attention, value)), attn(x)[0, row, column], rtol=1e-6, atol=1e-8
        )


def test_focalnet_pictures_show_the_gates_of_every_level() -> None:
    module, x, _ = _seen(create_model("test_focalnet").double().eval(), "FocalModulation")
    with torch.no_grad():
        gates, length = gates_and_modulator(module, x)
        assert torch.equal(gates, module.f(x)[0, ..., 2 * module.dim :].permute(2, 0, 1))
        module.proj = nn.Identity()
        modulated = module(x)[0] / module.f(x)[0, ..., : module.dim]
    torch.testing.assert_close(modulated.norm(dim=-1), length, rtol=1e-4, atol=1e-8)


@pytest.mark.parametrize("border", ["zero", "masked"])
def test_halonet_pictures_reproduce_the_outputs_of_its_attention(border: str) -> None:
    net: Any = create_model("test_halonet", border=border, num_heads=1).double().eval()
    for stage in (1, 2):  # the attention of stage 3 has strided queries in its first block
        attn = next(m for m in net.stages[stage].modules() if type(m).__name__ == "HaloAttention")
        with torch.no_grad():
            x = inputs_of(net, [attn], torch.randn(3, 75, 113, dtype=torch.float64))[attn]
            attention, (top, left) = halo_window(attn, x, (0.1, 0.6))
            _, kv = attn.project(x)
            value = nn.functional.pad(kv[0, :, :, 0, attn.head_dim :], (0, 0, 9, 9, 9, 9))
            span = len(attention)
            value = value[top + 9 : top + 9 + span, left + 9 : left + 9 + span]
            out = attn(x)[0].permute(1, 2, 0)
            row, column = token_at((0.1, 0.6), (out.shape[0], out.shape[1]))
            torch.testing.assert_close(torch.einsum("yx,yxc->c", attention, value), out[row, column])


def test_ravlt_weights_have_mean_one_and_raise_no_rank_beyond_the_head() -> None:
    module, x, _ = _seen(create_model("test_ravlt").double().eval(), "GatedAttention")
    with torch.no_grad():
        kappa, before, after = key_weights(module, x)
    torch.testing.assert_close(kappa.mean((1, 2)), torch.ones(module.num_heads, dtype=torch.float64))
    assert bool((before >= 1).all())
    assert bool((after <= module.dim // module.num_heads + 1e-4).all())
