"""The magnifier beside a plain Llama whose maps are written out; caches, beams, padding; memory; files; refusals."""

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import LlamaConfig, LlamaForCausalLM, Qwen3Config, Qwen3ForCausalLM, StaticCache

from vlm_tools.models.scene_magnifier import (
    SceneMagnifier,
    chosen_tokens,
    crop_tokens,
    load_official,
    magnified,
    read_scene,
)

SIZES: dict[str, Any] = {
    "vocab_size": 40,
    "hidden_size": 24,
    "intermediate_size": 32,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": None,
}
WIDTH = SIZES["hidden_size"]


def decoder(kind: Any = LlamaForCausalLM, config: Any = LlamaConfig, **options: Any) -> Any:
    """A random decoder whose rows prefer some keys."""
    torch.manual_seed(0)
    model = kind(config(**{**SIZES, "attention_bias": True, **options})).eval()
    for name in [name for name, _ in model.named_modules()]:
        if name.endswith(("layernorm", "model.norm")):  # transformers' own is computed in float32
            model.set_submodule(name, torch.nn.RMSNorm(WIDTH, eps=1e-6))
    model.double()
    with torch.no_grad():
        for name, value in model.named_parameters():
            value.mul_(6.0 if "q_proj" in name or "k_proj" in name else 2.0).add_(0.05 * torch.randn_like(value))
    return model


def magnifier_of(model: Any, **options: Any) -> SceneMagnifier:
    """One whose projections are not the decoder's."""
    torch.manual_seed(1)
    made = SceneMagnifier(model, **{"start": 1, **options}).eval()
    with torch.no_grad():
        for value in made.parameters():
            value.add_(0.1 * torch.randn_like(value))
    return made


def prompt(rows: int = 2, scene: int = 5, per_token: int = 3) -> dict[str, Tensor]:
    """Row n: 2n tokens of padding, a beginning of one token, the scene, a text; scenes start at places of their own."""
    torch.manual_seed(2)
    length = 2 * (rows - 1) + 1 + scene + 4
    ids, shown = torch.randint(3, 40, (rows, length)), torch.zeros(rows, length, dtype=torch.bool)
    mask = torch.ones_like(ids)
    for row in range(rows):
        mask[row, : 2 * row] = 0
        shown[row, 2 * row + 1 : 2 * row + 1 + scene] = True
    dense = torch.randn(rows, scene, per_token, WIDTH, dtype=torch.float64)
    return {"ids": ids, "mask": mask, "scene": shown, "dense": dense}


# Whole: one network from its paper, written out in the order that it computes.
def plain(model: Any, magnifier: SceneMagnifier, row: int, given: dict[str, Tensor], share: float = 1.0) -> Tensor:
    """Logits of one row without its padding: a Llama of loops over heads and rows, from the paper's text."""
    w = dict(model.state_dict())
    keep = given["mask"][row].bool()
    ids, scene = given["ids"][row][keep], given["scene"][row][keep].nonzero()[:, 0]
    dense, count = given["dense"][row], len(ids)
    heads, groups, width = 4, 2, WIDTH // 4
    frequency = 1 / 10_000.0 ** (torch.arange(0, width, 2).float() / width)  # transformers rotates in float32

    def norm(x: Tensor, name: str) -> Tensor:
        return x / (x.square().mean(-1, keepdim=True) + 1e-6).sqrt() * w[name]

    def turn(x: Tensor, place: int) -> Tensor:
        cos, sin = (place * frequency).cos(), (place * frequency).sin()
        one, other = x[: width // 2], x[width // 2 :]
        return torch.cat([one * cos - other * sin, other * cos + one * sin])

    x = w["model.embed_tokens.weight"][ids]
    chosen: dict[int, list[int]] | None = None
    for layer in range(4):
        own = f"model.layers.{layer}."
        hidden = norm(x, own + "input_layernorm.weight")
        q, k, v = (
            (hidden @ w[f"{own}self_attn.{n}_proj.weight"].T + w[f"{own}self_attn.{n}_proj.bias"]).view(
                count, -1, width
            )
            for n in "qkv"
        )
        found = torch.zeros(count, heads, width, dtype=torch.float64)
        mass = torch.zeros(count, len(scene), dtype=torch.float64)
        for n in range(count):
            for head in range(heads):
                group = head // (heads // groups)
                query = turn(q[n, head], n)
                keys = torch.stack([turn(k[m, group], m) for m in range(n + 1)])
                score = (keys @ query / math.sqrt(width)).exp()
                ordinary = (score / score.sum()) @ v[: n + 1, group]
                found[n, head] = ordinary
                if n <= scene[-1]:
                    continue
                mass[n] += score[scene] / score.sum()
                if layer > 1 and chosen is not None:
                    closer_k, closer_v = [keys], [v[: n + 1, group]]
                    for token in chosen[n]:
                        for part, weights in ((closer_k, magnifier.keys), (closer_v, magnifier.values)):
                            linear: Any = weights[str(layer)]
                            made = (dense[token] @ linear.weight.T + linear.bias).view(-1, groups, width)[:, group]
                            turned = [turn(one, int(scene[token])) for one in made]
                            part.append(torch.stack(turned) if part is closer_k else made)
                    all_scores = (torch.cat(closer_k) @ query / math.sqrt(width)).exp()
                    closer = (all_scores / all_scores.sum()) @ torch.cat(closer_v)
                    found[n, head] = (1 - share) * ordinary + share * closer
        if layer >= 1:
            chosen = {}
            for n in range(int(scene[-1]) + 1, count):
                stretched = (mass[n] - mass[n].min()) / (mass[n].max() - mass[n].min())
                chosen[n] = [t for t, value in enumerate(stretched.tolist()) if 255 * value > 96]
        x = x + found.reshape(count, -1) @ w[own + "self_attn.o_proj.weight"].T + w[own + "self_attn.o_proj.bias"]
        gate, up = (
            norm(x, own + "post_attention_layernorm.weight") @ w[f"{own}mlp.{name}_proj.weight"].T
            for name in ("gate", "up")
        )
        x = x + (gate * torch.sigmoid(gate) * up) @ w[own + "mlp.down_proj.weight"].T
    return norm(x, "model.norm.weight") @ w["lm_head.weight"].T


def logits(model: Any, magnifier: SceneMagnifier, given: dict[str, Tensor], **options: Any) -> Tensor:
    """Of the whole prompt under the magnifier; positions count from the first visible token."""
    with magnified(model, magnifier, given["dense"], given["scene"]):
        places = (given["mask"].cumsum(-1) - 1).clamp_min(0)
        return model(given["ids"], attention_mask=given["mask"], position_ids=places, **options).logits


@pytest.mark.parametrize("share", [1.0, 0.3])
def test_logits_and_gradients_are_those_of_a_plain_llama_with_its_maps_written_out(share: float) -> None:
    model, given = decoder(), prompt()
    magnifier = magnifier_of(model, warm_up=2.0)
    if share < 1:
        magnifier.train()
        magnifier.progress = share / 2
    given["dense"].requires_grad_()
    found = logits(model, magnifier, given)
    learned = [given["dense"], *magnifier.parameters()]
    total: Any = 0
    for row in range(2):
        keep = given["mask"][row].bool()
        expected = plain(model, magnifier, row, given, share)
        torch.testing.assert_close(found[row][keep], expected, atol=1e-9, rtol=1e-9)
        total = total + (expected.sin()).sum()
    ours = torch.autograd.grad((found.sin() * given["mask"][..., None]).sum(), learned)
    theirs = torch.autograd.grad(total, learned)
    assert all(bool(one.abs().sum() > 0) for one in theirs[:2])
    for one, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(one, other, atol=1e-8, rtol=1e-8)


def test_the_model_is_as_before_afterwards_and_the_scene_does_not_look_at_itself() -> None:
    model, given = decoder(), prompt(1)
    before = model(given["ids"]).logits
    found = logits(model, magnifier_of(model), given)
    assert not torch.allclose(found[:, -1], before[:, -1])
    torch.testing.assert_close(found[:, :6], before[:, :6], atol=1e-12, rtol=0)
    assert model.config._attn_implementation == "sdpa"
    assert torch.equal(model(given["ids"]).logits, before)
    with (
        pytest.raises(RuntimeError, match="stop"),
        magnified(model, magnifier_of(model), given["dense"], given["scene"]),
    ):
        raise RuntimeError("stop")
    assert torch.equal(model(given["ids"]).logits, before)


@pytest.mark.parametrize("kind", ["dynamic", "chunks", "static"])
def test_decoding_with_a_cache_gives_the_logits_of_the_whole_text(kind: str) -> None:
    model, given = decoder(), prompt()
    magnifier, past = magnifier_of(model), 10 if kind != "chunks" else 4
    whole = logits(model, magnifier, given)
    places = (given["mask"].cumsum(-1) - 1).clamp_min(0)
    cache = StaticCache(config=model.config, max_cache_len=20) if kind == "static" else None
    parts = [slice(0, past), *(slice(n, n + 1) for n in range(past, whole.shape[1]))]
    found = []
    with magnified(model, magnifier, given["dense"], given["scene"]):
        for part in parts:
            out = model(given["ids"][:, part], attention_mask=given["mask"][:, : part.stop], use_cache=True,
                        position_ids=places[:, part], past_key_values=cache)  # fmt: skip
            cache = out.past_key_values
            found.append(out.logits)
    shown = given["mask"].bool()
    torch.testing.assert_close(torch.cat(found, 1)[shown], whole[shown], atol=1e-10, rtol=0)


def test_a_row_of_a_batch_generates_as_alone_with_beams_and_padding() -> None:
    model, given = decoder(), prompt()
    magnifier = magnifier_of(model)
    options: dict[str, Any] = {"num_beams": 2, "max_new_tokens": 3, "do_sample": False}
    with torch.no_grad(), magnified(model, magnifier, given["dense"], given["scene"]):
        both = model.generate(given["ids"], attention_mask=given["mask"], **options)
    ids = given["ids"][1:, 2:]
    with torch.no_grad(), magnified(model, magnifier, given["dense"][1:], given["scene"][1:, 2:]):
        alone = model.generate(ids, attention_mask=torch.ones_like(ids), **options)
    assert both[1, -3:].tolist() == alone[0, -3:].tolist()


def test_options_choose() -> None:
    model, given = decoder(), prompt(1)
    ordinary = model(given["ids"]).logits
    found = logits(model, magnifier_of(model), given)
    for options in ({"start": 2}, {"threshold": 0.95}, {"threshold": 0.0}):
        assert not torch.allclose(logits(model, magnifier_of(model, **options), given), found)
    warming = magnifier_of(model, warm_up=20.0).train()
    warming.progress = 0.0
    torch.testing.assert_close(logits(model, warming, given), ordinary, atol=1e-12, rtol=0)
    wholly = magnifier_of(model, warm_up=None).train()
    wholly.progress = 0.0
    torch.testing.assert_close(logits(model, wholly, given), found, atol=1e-12, rtol=0)
    none = torch.zeros_like(given["scene"])
    with magnified(model, magnifier_of(model), given["dense"], given["scene"], asks=none):
        torch.testing.assert_close(model(given["ids"]).logits, ordinary, atol=1e-12, rtol=0)


def test_rows_of_equal_scores_and_rows_that_see_nothing_choose_nothing() -> None:
    q, k = torch.zeros(1, 2, 3, 4), torch.randn(1, 1, 6, 4)
    lse = torch.full((1, 2, 3), math.log(6.0))
    lse[..., 2] = -torch.inf
    assert not chosen_tokens(q, k, lse, scale=0.5).any()
    assert chosen_tokens(q, k[:, :, :0], lse, scale=0.5).shape == (1, 3, 0)
    assert chosen_tokens(q[:0], k[:0], lse[:0], scale=0.5).shape == (0, 3, 6)
    seen = torch.tensor([[True, True, False, False, False, False]])
    assert chosen_tokens(q, k, lse, scale=0.5, visible=seen)[0].tolist() == [seen[0].tolist()] * 2 + [[False] * 6]
    with pytest.raises(ValueError, match=r"^chosen_tokens: lse must be \(B, H, N\)"):
        chosen_tokens(q, k, lse[:, :1], scale=0.5)


class _Largest(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.elements = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for value in out if isinstance(out, tuple | list) else (out,):
            if isinstance(value, torch.Tensor):
                self.elements = max(self.elements, value.untyped_storage().nbytes() // value.element_size())
        return out


@pytest.mark.parametrize("tokens", [512, pytest.param(4096, marks=pytest.mark.slow)])
def test_no_map_is_allocated(tokens: int) -> None:
    heads, scene = 4, 16
    model = decoder().float()
    magnifier = magnifier_of(model)
    shown = torch.zeros(1, tokens, dtype=torch.bool)
    shown[:, 1 : 1 + scene] = True
    with torch.no_grad(), magnified(model, magnifier, torch.randn(1, scene, 4, WIDTH), shown), _Largest() as seen:
        model(torch.ones(1, tokens, dtype=torch.long), use_cache=False, logits_to_keep=1)
    # its largest tensor is the mask of transformers or the bias of 64 dense tokens
    assert seen.elements < heads * tokens * tokens / 2
    if tokens == 4096:
        assert seen.elements <= tokens * tokens


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_stays_near_float32(dtype: torch.dtype) -> None:
    given = prompt(1)
    torch.manual_seed(0)
    model: Any = LlamaForCausalLM(LlamaConfig(**SIZES)).eval()
    magnifier = SceneMagnifier(model, start=1, threshold=0.0).eval()
    given["dense"] = given["dense"].float()
    found = logits(model, magnifier, given)
    half = logits(model.to(dtype), magnifier.to(dtype), {**given, "dense": given["dense"].to(dtype)})
    assert half.dtype == dtype
    # what the layers' own rounding gives: four of them in a width of 24
    torch.testing.assert_close(half.float(), found, atol=2e-2 if dtype == torch.bfloat16 else 3e-3, rtol=0)


def test_keys_pass_the_decoders_norm() -> None:
    model = decoder(Qwen3ForCausalLM, Qwen3Config, head_dim=6)
    magnifier, given = magnifier_of(model), prompt(1)
    found = logits(model, magnifier, given)
    doubled = magnifier_of(model)
    with torch.no_grad():
        for linear in doubled.keys.children():
            for value in linear.parameters():
                value.mul_(2)
    # the norm takes the scale of keys away
    torch.testing.assert_close(logits(model, doubled, given), found, atol=1e-4, rtol=1e-4)


def test_official_projections_are_found_in_a_whole_llama() -> None:
    model = decoder()
    magnifier, other = magnifier_of(model), SceneMagnifier(model, start=1)
    official = {f"module.llm.{name}": value for name, value in model.state_dict().items()}
    for layer in (1, 2, 3):  # the first is there and never used
        for part, theirs in (("keys", "k_proj_hd"), ("values", "v_proj_hd")):
            for kind in ("weight", "bias"):
                mine = magnifier.state_dict()[f"{part}.{max(layer, 2)}.{kind}"]
                official[f"module.llm.model.layers.{layer}.self_attn.{theirs}.{kind}"] = mine
    load_official(other, official)
    assert all(torch.equal(value, other.state_dict()[name]) for name, value in magnifier.state_dict().items())
    load_official(other, magnifier.state_dict())
    del official["module.llm.model.layers.3.self_attn.k_proj_hd.weight"]
    with pytest.raises(ValueError, match=r"missing model\.layers\.3\.self_attn\.k_proj_hd\.weight"):
        load_official(other, official)


def test_crops_are_the_cells_of_the_grid() -> None:
    image = torch.arange(8 * 12, dtype=torch.float64).view(1, 1, 8, 12)
    tokens = crop_tokens(image, (2, 3), 2)
    assert tokens.shape == (1, 6, 4, 1)
    assert tokens[0, 4, 2, 0] == image[0, 0, 6:8, 4:6].mean()
    wrong: list[dict[str, Any]] = [{"grid": (0, 3)}, {"grid": (5, 3)}, {"grid": (2, 3), "per_side": 5}]
    for options in wrong:
        with pytest.raises(ValueError, match=r"^crop_tokens: grid and per_side must be at least 1 .* got grid="):
            crop_tokens(image, **options)


def test_files_of_scenes(tmp_path: Path) -> None:
    coarse, dense = torch.randn(3, 5), torch.randn(3, 2, 5)
    np.savez(tmp_path / "a.npz", coarse=coarse.numpy(), dense=dense.numpy().astype(np.float64))
    save_file({"coarse": coarse.half(), "dense": dense.half()}, tmp_path / "b.SAFETENSORS")
    for name, error in (("a.npz", 1e-7), ("b.SAFETENSORS", 5e-3)):
        for found, wanted in zip(read_scene(tmp_path / name), (coarse, dense), strict=True):
            assert found.dtype == torch.float32
            torch.testing.assert_close(found, wanted, atol=error, rtol=0)
    np.savez(tmp_path / "c.npz", coarse=coarse.numpy(), dense=dense[:2].numpy())
    np.savez(tmp_path / "d.npz", coarse=coarse.numpy())
    np.savez(tmp_path / "e.npz", coarse=coarse.numpy() * np.inf, dense=dense.numpy())
    (tmp_path / "f.npz").write_bytes(b"PK\x03\x04 not a file")
    (tmp_path / "g.safetensors").write_bytes(b"no")
    for name, message in (
        ("c.npz", r"holds coarse \(3, 5\) and dense \(2, 2, 5\), not"),
        ("d.npz", "cannot be read .*dense"),
        ("e.npz", "not finite"),
        ("f.npz", "cannot be read"),
        ("g.safetensors", "cannot be read"),
        ("h.txt", "its ending is '.txt'"),
        ("i.npz", "cannot be read"),
    ):
        with pytest.raises(ValueError, match=rf"^read_scene: .*{message}|^read_scene: coarse of .*{message}"):
            read_scene(tmp_path / name)


def test_refusals() -> None:
    model, given = decoder(), prompt()
    magnifier, dense, scene = magnifier_of(model), given["dense"], given["scene"]
    for options, message in (
        ({"start": 3}, r"start must lie in 0 … 2, so that a layer is behind it, got start=3"),
        ({"threshold": 1.0}, r"threshold must lie in \[0, 1\), got threshold=1.0"),
        ({"warm_up": 0.0}, "warm_up must be positive or None, got warm_up=0.0"),
    ):
        with pytest.raises(ValueError, match=f"^SceneMagnifier: {message}"):
            magnifier_of(model, **options)
    with pytest.raises(ValueError, match=r"^SceneMagnifier: Linear has no decoder"):
        SceneMagnifier(torch.nn.Linear(2, 2))  # type: ignore[arg-type]
    for wrong, message in (
        ({"dense": dense[..., :5]}, r"dense must be \(B, S, P, 24\), got \(2, 5, 3, 5\)"),
        ({"scene": scene.long()}, r"scene must be \(B, T\) of bool, got \(2, 12\) of torch.int64"),
        ({"dense": dense[:, :4]}, r"scene must mark the S tokens .* got dense \(2, 4, 3, 24\) and \[5, 5\] tokens"),
        ({"asks": scene[:, :3]}, r"asks must be bool and of the shape of scene, \(2, 12\), got \(2, 3\)"),
        ({"asks": scene}, "asks marks rows before the scene's last token"),
        ({"model": decoder(num_hidden_layers=5)}, "made for a decoder of width 24 and layers up to 3"),
    ):
        block: Any = {"model": model, "magnifier": magnifier, "dense": dense, "scene": scene, **wrong}
        with pytest.raises(ValueError, match=f"^magnified: .*{message}"), magnified(**block):
            pass
    with magnified(model, magnifier, dense, scene):
        with pytest.raises(ValueError, match="in such a block already"), magnified(model, magnifier, dense, scene):
            pass
        with pytest.raises(ValueError, match="scene has 2 rows, the prompt 3"):
            model(given["ids"][[0, 0, 1]])
    dropping = decoder(attention_dropout=0.5).train()
    with magnified(dropping, magnifier, dense, scene), pytest.raises(ValueError, match="dropout of attention"):
        dropping(given["ids"])
