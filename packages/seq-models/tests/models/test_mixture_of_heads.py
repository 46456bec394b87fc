"""Mixture of heads in Llama-like models: the router, a network written out, heads that are skipped, what is refused.

The official lines of the router (SkyworkAI/MoH, ``modeling_llama.py``) gave equal bits in 16 cases of all dtypes.
"""

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM, Phi3Config, Phi3ForCausalLM, Qwen3Config, Qwen3ForCausalLM

from attn_core.nn import balance_losses
from seq_models.layers.s2_attention import ShardPattern
from seq_models.models import create_model
from seq_models.models.mixture_of_heads import MoHLlamaConfig, head_numbers, norm_gates, patch_mixture_of_heads
from seq_models.models.s2_attention import shard_context


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_gates_are_those_of_the_published_rule_bit_for_bit(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    raw = torch.randn(2, 30, 8, 16).to(dtype)
    ours = norm_gates(raw, 4, 2)
    for b in range(2):
        for t in range(30):
            norms = torch.stack([raw[b, t, head].norm(p=2) for head in range(4, 8)])
            score = torch.softmax(norms / norms.std(), 0)
            expected = [1.0] * 4 + [0.0] * 4
            for best in score.topk(2).indices.tolist():
                expected[4 + best] = 1.0
            assert ours[b, t].tolist() == expected
    assert ours.dtype == dtype


def test_shares_are_rounded_down_as_officially() -> None:
    assert head_numbers(32, 0.5, 0.75) == (16, 8)
    assert head_numbers(6, 0.5, 0.75) == (3, 1)
    assert head_numbers(10, 0.5, 0.7) == (5, 2)  # 0.7 - 0.5 is below 0.2
    assert head_numbers(8, 0.0, 0.25) == (0, 2)


def turned(x: Tensor) -> Tensor:
    """Llama's rotary embedding, halves against halves; x (H, N, D)."""
    n, width = x.shape[1:]
    angle = torch.arange(n).double()[:, None] * 10000.0 ** (-torch.arange(0, width, 2).double() / width)
    turn = torch.complex(x[..., : width // 2], x[..., width // 2 :]) * torch.polar(torch.ones_like(angle), angle)
    return torch.cat([turn.real, turn.imag], -1)


def plain(state: dict[str, Tensor], ids: Tensor, config: MoHLlamaConfig) -> tuple[Tensor, Tensor]:
    """Logits of one row and the gates of the first layer, token by token; shares nothing with ours."""

    def normed(x: Tensor, weight: Tensor) -> Tensor:
        return x / (x.square().mean(-1, keepdim=True) + config.rms_norm_eps).sqrt() * weight

    n, heads, groups = len(ids), config.num_attention_heads, config.num_key_value_heads
    width, shared = config.hidden_size // heads, heads // 2
    x, first = state["model.embed_tokens.weight"][ids], None
    for layer in range(config.num_hidden_layers):
        p = {k.removeprefix(f"model.layers.{layer}."): v for k, v in state.items() if f".layers.{layer}." in k}
        y = normed(x, p["input_layernorm.weight"])
        raw, k, v = ((y @ p[f"self_attn.{t}_proj.weight"].T).view(n, -1, width).transpose(0, 1) for t in "qkv")
        q, k = turned(raw), turned(k)
        gates = torch.zeros(n, heads).double()
        for t in range(n):
            if config.router == "norm":
                gates[t, :shared] = 1
                for head in sorted(range(shared, heads), key=lambda h, t=t, raw=raw: -float(raw[h, t].norm()))[:2]:
                    gates[t, head] = 1
            else:
                score = (p["self_attn.router.wg.weight"] @ y[t]).softmax(0)
                best = score.topk(2).indices
                among, between = (p[f"self_attn.router.wg_{i}.weight"] @ y[t] for i in (1, 0))
                weight = 2 * between.softmax(0)
                gates[t, :shared] = weight[0] * shared * among.softmax(0)
                gates[t, shared + best] = weight[1] * 2 * score[best] / score[best].sum()
        first = gates if first is None else first
        out = torch.zeros(n, heads, width).double()
        for h in range(heads):
            for t in range(n):
                g = h // (heads // groups)  # pyright: ignore[reportOperatorIssue]
                weight = (k[g, : t + 1] @ q[h, t] / width**0.5).softmax(0)
                out[t, h] = gates[t, h] * (weight @ v[g, : t + 1])
        x = x + out.reshape(n, -1) @ p["self_attn.o_proj.weight"].T
        y = normed(x, p["post_attention_layernorm.weight"])
        gate = y @ p["mlp.gate_proj.weight"].T
        x = x + (gate / (1 + (-gate).exp()) * (y @ p["mlp.up_proj.weight"].T)) @ p["mlp.down_proj.weight"].T
    assert first is not None
    return normed(x, state["model.norm.weight"]) @ state["lm_head.weight"].T, first


@pytest.mark.parametrize("name", ["test_moh", "test_moh_learned"])
@torch.no_grad()
def test_the_whole_network_equals_a_plain_one_written_out(name: str) -> None:
    torch.manual_seed(0)
    model: Any = create_model(name).double().eval()
    for parameter in model.parameters():
        parameter.add_(torch.randn_like(parameter) * 0.2)
    ids = torch.randint(0, 256, (11,))
    expected, gates = plain(model.state_dict(), ids, model.config)
    seen: list[Tensor] = []
    attention = model.model.layers[0].self_attn
    inner = attention.gates
    attention.gates = lambda *given: seen.append(inner(*given)) or seen[-1]
    assert (model(ids[None]).logits[0] - expected).abs().max() < 1e-5  # angles in float32
    assert (seen[0][0] - gates).abs().max() < 2e-6  # the norm in front of the router computes in float32
    state, steps = model(ids[None, :4], use_cache=True).past_key_values, []
    for token in ids[4:]:
        out = model(token[None, None], past_key_values=state)
        state = out.past_key_values
        steps.append(out.logits[0, 0])
    assert (torch.stack(steps) - expected[4:]).abs().max() < 1e-5


SIZES: dict[str, Any] = {
    "vocab_size": 64, "hidden_size": 32, "intermediate_size": 40, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "pad_token_id": None,
}  # fmt: skip
HOSTS: dict[str, Any] = {
    "llama": lambda: LlamaForCausalLM(LlamaConfig(**SIZES)),
    "qwen3": lambda: Qwen3ForCausalLM(Qwen3Config(**SIZES, head_dim=8)),
    "phi3": lambda: Phi3ForCausalLM(Phi3Config(**SIZES)),
}


@pytest.mark.parametrize("host", HOSTS)
@torch.no_grad()
def test_with_all_heads_active_any_host_stays_as_it_was(host: str) -> None:
    torch.manual_seed(0)
    model: Any = HOSTS[host]().double().eval()
    ids = torch.randint(0, 64, (2, 9))
    before, names = model(ids).logits, set(model.state_dict())
    patch_mixture_of_heads(model, 0.5, 1.0)
    assert (model(ids).logits - before).abs().max() < 1e-10
    assert set(model.state_dict()) == names
    patch_mixture_of_heads(model, 0.25, 0.5)
    less = model(ids).logits
    assert (less - before).abs().max() > 1e-6
    patch_mixture_of_heads(model, active=0.75)
    assert (model(ids).logits - less).abs().max() > 1e-6
    assert model.config.mixture_of_heads == {"shared": 0.25, "active": 0.75, "router": "norm"}


@torch.no_grad()
def test_heads_that_are_off_are_not_computed_in_decoding() -> None:
    """Keys and values of a head that its token left out may hold anything: NaN times 0 would be NaN."""
    torch.manual_seed(0)
    model: Any = create_model("test_moh", num_hidden_layers=1, num_key_value_heads=8).double().eval()
    ids = torch.randint(0, 256, (1, 800))
    state = model(ids, use_cache=True).past_key_values
    token = torch.tensor([[7]])
    attention = model.model.layers[0].self_attn
    x = model.model.layers[0].input_layernorm(model.model.embed_tokens(token))
    gates = norm_gates(attention.q_proj(x).unflatten(-1, (8, 4)), 4, 2)[0, 0]
    off = (gates == 0).nonzero()[:, 0]
    assert len(off) == 2
    clean = model(torch.cat([ids, token], 1)).logits[:, -1]
    state.layers[0].keys[:, off] = torch.nan
    state.layers[0].values[:, off] = torch.nan
    assert (model(token, past_key_values=state).logits[:, -1] - clean).abs().max() < 1e-10


def test_the_learned_router_trains_and_tells_its_balance() -> None:
    torch.manual_seed(0)
    model: Any = create_model("test_moh_learned").double()
    ids = torch.randint(0, 256, (2, 12))
    with balance_losses(model) as balances:
        loss = model(ids, labels=ids).loss
    assert len(balances) == 2
    assert all(1 < float(balance.detach()) < 4 for balance in balances)  # 2 of 4 heads: 2 where all are chosen equally
    (loss + 0.01 * torch.stack(balances).mean()).backward()
    routers = [p for name, p in model.named_parameters() if ".router." in name]
    assert len(routers) == 6
    assert all(p.grad is not None and bool(p.grad.any()) for p in routers)


def test_shares_are_kept_in_the_config_for_the_next_load(tmp_path: Any) -> None:
    model = LlamaForCausalLM(LlamaConfig(**SIZES)).eval()
    patch_mixture_of_heads(model, 0.25, 0.5)
    model.save_pretrained(tmp_path)
    loaded = LlamaForCausalLM.from_pretrained(tmp_path)
    ids = torch.randint(0, 64, (1, 12))
    assert not torch.allclose(loaded(ids).logits, model(ids).logits)
    patch_mixture_of_heads(loaded)
    torch.testing.assert_close(loaded(ids).logits, model(ids).logits)


def test_parameters_of_the_published_size_are_llama_s() -> None:
    with torch.device("meta"):
        model: Any = create_model("moh_llama3_8b")
    assert sum(p.numel() for p in model.parameters()) == 8_030_261_248
    attention = model.model.layers[0].self_attn
    assert (attention.num_shared, attention.num_routed) == (16, 8)


def test_every_field_of_the_config_changes_the_network() -> None:
    ids, logits = torch.randint(0, 255, (1, 20)), {}
    for name, value in {"": None, "shared_heads": 0.25, "active_heads": 1.0, "router": "learned"}.items():
        torch.manual_seed(0)
        model: Any = create_model("test_moh", **({name: value} if name else {})).double().eval()
        with torch.no_grad():
            logits[name] = model(ids).logits
    assert all((logits[name] - logits[""]).abs().max() > 1e-6 for name in logits if name)


def test_what_does_not_fit_is_named() -> None:
    llama = LlamaForCausalLM(LlamaConfig(**SIZES))
    learned = patch_mixture_of_heads(LlamaForCausalLM(LlamaConfig(**SIZES)), router="learned")
    odd: Any = "best"
    for call, words in [
        (lambda: patch_mixture_of_heads(llama, 0.8, 0.5), "0 ≤ shared < active ≤ 1 must hold, got shared=0.8"),
        (lambda: patch_mixture_of_heads(llama, 0.5, 0.6), "leave 0 to choose among 2; there must be 1 among 2"),
        (lambda: patch_mixture_of_heads(llama, router=odd), "router must be 'norm' or 'learned', got 'best'"),
        (lambda: patch_mixture_of_heads(learned, router="norm"), "layer 0 has a router of its own"),
        (lambda: create_model("test_moh", active_heads=1.5), "must hold, got shared=0.5, active=1.5"),
        (lambda: patch_mixture_of_heads(nn.Linear(2, 2)), "model must be Llama-like"),  # pyright: ignore[reportArgumentType]
        (lambda: shard_context(learned, ShardPattern(2, 1, 2)), "layer 0 was changed before, into MoHAttention"),
        (
            lambda: patch_mixture_of_heads(shard_context(llama, ShardPattern(2, 1, 2))),
            "layer 0 was changed before, into S2Attention",
        ),
    ]:
        with pytest.raises(ValueError, match=words):
            call()


def test_one_head_is_no_choice() -> None:
    with pytest.raises(ValueError, match="leave 1 to choose among 1; there must be 1 among 2 at least"):
        head_numbers(4, 0.75, 1.0)
