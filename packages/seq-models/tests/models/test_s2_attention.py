"""S2-Attention: the pattern, a Llama written out under it, the cache that forgets, export, and what is refused.

The official generator of patterns (linxihui/dkernel, ``get_sparse_attn_mask``) gave equal masks for 385 patterns.
"""

import itertools
import warnings
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.attention.flex_attention import flex_attention
from transformers import (
    BertConfig,
    BertLMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    Phi3Config,
    Phi3ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)
from transformers.cache_utils import DynamicCache

from seq_models.layers import s2_attention
from seq_models.layers.s2_attention import HeadShards, S2Cache, ShardPattern, sharded_attention
from seq_models.models import create_model
from seq_models.models.s2_attention import VARIANTS, S2LlamaConfig, shard_context


def visible(h: int, i: int, j: int, shards: HeadShards) -> bool:
    """The paper's rule for query i, key j and query head h, in tokens."""
    p = shards.pattern
    g, r, c = h // (shards.num_heads // shards.num_kv_heads), i // p.block_size, j // p.block_size
    step = max(1, p.vert_stride // shards.num_heads) if p.head_step is None else p.head_step
    if j > i:
        return False
    dense = g >= shards.num_kv_heads - p.num_dense_heads
    return dense or r - c < p.local_blocks or (c + g * step + p.head_offset) % p.vert_stride == 0


def mask_of(shards: HeadShards, tokens: int) -> Tensor:
    """(H, N, N)."""
    rows = [[[visible(h, i, j, shards) for j in range(tokens)] for i in range(tokens)] for h in range(shards.num_heads)]
    return torch.tensor(rows)


PATTERNS = [
    ShardPattern(2, 2, 3).for_heads(4, 2),
    ShardPattern(3, 1, 8).for_heads(4, 4),
    ShardPattern(4, 3, 2, num_dense_heads=1).for_heads(4, 2),
    ShardPattern(2, 1, 4, num_dense_heads=2, head_step=3, head_offset=1).for_heads(6, 6),
    ShardPattern(1, 1, 5, head_step=0).for_heads(2, 1),
]


@pytest.mark.parametrize("shards", PATTERNS, ids=repr)
@pytest.mark.parametrize("chunked", [False, True], ids=["blocks", "chunks"])
def test_outputs_and_gradients_equal_a_masked_softmax(
    shards: HeadShards, chunked: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Both paths × padding in front, behind and inside × head groups; gradients too."""
    monkeypatch.setattr(s2_attention, "LONG", 1 if chunked else 10**9)
    torch.manual_seed(0)
    tokens = 41
    q = torch.randn(3, shards.num_heads, tokens, 4).double().requires_grad_()
    k, v = (torch.randn(3, shards.num_kv_heads, tokens, 4).double().requires_grad_() for _ in "kv")
    real = torch.ones(3, tokens, dtype=torch.bool)
    real[0, :5], real[1, 30:], real[2, 7:9] = False, False, False
    mask = mask_of(shards, tokens)
    for padding in (None, real):
        out = sharded_attention(q, k, v, shards, padding, scale=0.7)  # pyright: ignore[reportCallIssue]
        expected = torch.zeros_like(out)
        group = shards.num_heads // shards.num_kv_heads
        for row in range(3):
            at = torch.arange(tokens) if padding is None else padding[row].nonzero()[:, 0]
            keys, values = (x[row][:, at].repeat_interleave(group, 0) for x in (k, v))
            scores = (0.7 * q[row][:, at] @ keys.mT).masked_fill(~mask[:, : len(at), : len(at)], -torch.inf)
            expected[row, :, at] = scores.softmax(-1) @ values
        assert (out - expected).abs().max() < 1e-10
        probe = torch.randn_like(out)
        pairs = [torch.autograd.grad((x * probe).sum(), (q, k, v)) for x in (out, expected)]
        assert all((a - b).abs().max() < 1e-10 for a, b in zip(*pairs, strict=True))


@pytest.mark.parametrize("shards", PATTERNS, ids=repr)
def test_the_last_tokens_alone_give_their_part(shards: HeadShards) -> None:
    q, k, v = (torch.randn(2, n, 23, 4).double() for n in (shards.num_heads, *[shards.num_kv_heads] * 2))
    real = torch.ones(2, 23, dtype=torch.bool)
    real[0, :4] = False
    whole = sharded_attention(q, k, v, shards, real)  # pyright: ignore[reportCallIssue]
    assert (sharded_attention(q[:, :, 17:], k, v, shards, real) - whole[:, :, 17:]).abs().max() < 1e-10  # pyright: ignore[reportCallIssue]
    assert not sharded_attention(q[:1, :, :4], k[:1, :, :4], v[:1, :, :4], shards, real[:1, :4]).any()  # pyright: ignore[reportCallIssue]


@pytest.mark.parametrize("shards", PATTERNS, ids=repr)
@torch.no_grad()
def test_the_cache_keeps_exactly_what_a_later_query_reads(shards: HeadShards) -> None:
    """After t tokens: token j of key head g is held if and only if some query i ≥ t reads it; bytes by formula."""
    tokens, later = 37, 37 + 80
    mask = mask_of(shards, later)[:: shards.num_heads // shards.num_kv_heads]  # heads of a group are alike
    layer = s2_attention.ShardedLayer(shards)
    q, k, v = (torch.randn(1, n, tokens, 4).double() for n in (shards.num_heads, *[shards.num_kv_heads] * 2))
    for t in range(tokens):
        layer.attend(q[:, :, t : t + 1], k[:, :, t : t + 1], v[:, :, t : t + 1], None, 0.5)
        needed = mask[:, t + 1 :, : t + 1].any(1)
        held = torch.zeros_like(needed)
        held[layer.owner, layer.position] = True
        assert torch.equal(held, needed)
        assert len(layer.owner) == needed.sum() == shards.kept_tokens(t + 1)
        assert torch.equal(layer.keys, k[0, :, : t + 1][needed])  # pyright: ignore[reportArgumentType]
        assert layer.nbytes() == 2 * 8 * 4 * shards.kept_tokens(t + 1)


@torch.no_grad()
def test_generation_equals_that_with_a_full_cache_which_is_larger() -> None:
    torch.manual_seed(0)
    model: Any = create_model("test_s2_hybrid").double().eval()
    ids = torch.randint(0, 255, (2, 30))
    mask = torch.ones_like(ids)
    mask[1, :3] = 0
    settings: dict[str, Any] = {"max_new_tokens": 12, "do_sample": False, "pad_token_id": 0, "attention_mask": mask}
    ours = model.generate(ids, return_dict_in_generate=True, **settings)
    full = model.generate(ids, past_key_values=DynamicCache(), return_dict_in_generate=True, **settings)
    assert torch.equal(ours.sequences, full.sequences)
    assert isinstance(ours.past_key_values, S2Cache)
    held = sum(layer.keys.nbytes + layer.values.nbytes for layer in full.past_key_values.layers)
    sharded = [layer for layer in ours.past_key_values.layers if isinstance(layer, s2_attention.ShardedLayer)]
    shards = sharded[0].shards
    formula = 2 * 8 * 8 * (shards.kept_tokens(41) + shards.kept_tokens(38))
    assert [layer.nbytes() for layer in sharded] == [formula, formula]
    assert ours.past_key_values.nbytes() == 2 * formula + held // 3 < 0.8 * held


def test_coverage_counts_residues_and_its_lack_is_warned_of() -> None:
    assert ShardPattern(2, 1, 8).for_heads(8, 8).coverage() == 1
    assert ShardPattern(2, 1, 8).for_heads(4, 4).coverage() == 0.5  # residues 0, 6, 4, 2
    assert ShardPattern(2, 1, 8).for_heads(32, 4).coverage() == 0.5
    assert ShardPattern(2, 1, 8, num_dense_heads=1).for_heads(4, 4).coverage() == 1
    assert ShardPattern(2, 1, 8, head_step=0).for_heads(8, 8).coverage() == 1 / 8
    read = mask_of(ShardPattern(1, 1, 8).for_heads(4, 4), 40)[:, 39].any(0)
    assert read[:39].reshape(-1).float().mean() == pytest.approx(0.5, abs=0.02)
    with pytest.warns(UserWarning, match="shard_context: 50% of the old blocks are read by no head; set head_step=1"):
        create_model("test_s2", vert_stride=8, num_key_value_heads=4, dense_every=0)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        create_model("test_s2", vert_stride=8, num_key_value_heads=4, dense_every=2)


def test_density_is_that_of_the_paper_s_rule() -> None:
    shards = ShardPattern(2, 4, 8).for_heads(8, 8)
    pairs = mask_of(shards, 64)[:, ::2, ::2].sum()
    assert shards.density(64) == pytest.approx(int(pairs) / (8 * 32 * 33 / 2))
    for tokens in (1, 63):
        assert 0 < shards.density(tokens) <= 1


@pytest.mark.parametrize("shards", PATTERNS[1:3], ids=repr)
def test_the_block_mask_shows_flex_attention_the_same_pattern(shards: HeadShards) -> None:
    tokens = 26
    q, k, v = (torch.randn(1, shards.num_heads, tokens, 8) for _ in "qkv")
    block_mask = shards.block_mask(tokens, "cpu")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # flex_attention says that it is slow without torch.compile
        theirs = flex_attention(q, k, v, block_mask=block_mask)
    scores = (q @ k.mT * 8**-0.5).masked_fill(~mask_of(shards, tokens), -torch.inf)
    torch.testing.assert_close(theirs, scores.softmax(-1) @ v, rtol=0, atol=2e-5)
    dense = block_mask.to_dense()[0].bool()
    size = shards.pattern.block_size
    blocks = -(-tokens // size)
    wide = torch.nn.functional.pad(mask_of(shards, tokens), (0, blocks * size - tokens, 0, blocks * size - tokens))
    assert torch.equal(dense, wide.unflatten(2, (blocks, size)).unflatten(1, (blocks, size)).any(4).any(2))


def turned(x: Tensor, theta: float) -> Tensor:
    """Llama's rotary embedding, halves against halves; x (H, N, D)."""
    n, width = x.shape[1:]
    angle = torch.arange(n).double()[:, None] * theta ** (-torch.arange(0, width, 2).double() / width)
    turn = torch.complex(x[..., : width // 2], x[..., width // 2 :]) * torch.polar(torch.ones_like(angle), angle)
    return torch.cat([turn.real, turn.imag], -1)


def plain(state: dict[str, Tensor], ids: Tensor, config: S2LlamaConfig) -> Tensor:
    """Logits of one row of a Llama whose dense layers and heads are where the paper says; shares nothing with ours."""

    def normed(x: Tensor, weight: Tensor) -> Tensor:
        return x / (x.square().mean(-1, keepdim=True) + config.rms_norm_eps).sqrt() * weight

    n, heads, groups = len(ids), config.num_attention_heads, config.num_key_value_heads
    x = state["model.embed_tokens.weight"][ids]
    for layer in range(config.num_hidden_layers):
        p = {k.removeprefix(f"model.layers.{layer}."): v for k, v in state.items() if f".layers.{layer}." in k}
        y = normed(x, p["input_layernorm.weight"])
        q, k, v = ((y @ p[f"self_attn.{t}_proj.weight"].T).view(n, -1, 8).transpose(0, 1) for t in "qkv")
        q, k = turned(q, 10000.0), turned(k, 10000.0)
        out = torch.zeros(heads, n, 8).double()
        for h, i in itertools.product(range(heads), range(n)):
            g = h // (heads // groups)  # pyright: ignore[reportOperatorIssue]
            everything = bool(config.dense_every) and (layer + 1) % config.dense_every == 0
            seen = [j for j in range(i + 1) if everything or visible(h, i, j, config.shards())]
            out[h, i] = (q[h, i] @ k[g, seen].T / 8**0.5).softmax(0) @ v[g, seen]
        x = x + out.transpose(0, 1).reshape(n, -1) @ p["self_attn.o_proj.weight"].T
        y = normed(x, p["post_attention_layernorm.weight"])
        gate = y @ p["mlp.gate_proj.weight"].T
        x = x + (gate / (1 + (-gate).exp()) * (y @ p["mlp.up_proj.weight"].T)) @ p["mlp.down_proj.weight"].T
    return normed(x, state["model.norm.weight"]) @ state["lm_head.weight"].T


@pytest.mark.parametrize("name", ["test_s2", "test_s2_hybrid"])
@torch.no_grad()
def test_the_whole_network_equals_a_plain_one_written_out(name: str) -> None:
    torch.manual_seed(0)
    model: Any = create_model(name).double().eval()
    for parameter in model.parameters():
        parameter.add_(torch.randn_like(parameter) * 0.2)
    ids = torch.randint(0, 256, (21,))
    expected = plain(model.state_dict(), ids, model.config)
    assert (model(ids[None]).logits[0] - expected).abs().max() < 1e-5  # angles in float32
    state = model(ids[None, :9], use_cache=True).past_key_values
    assert (model(ids[None, 9:], past_key_values=state).logits[0] - expected[9:]).abs().max() < 1e-5


SIZES: dict[str, Any] = {
    "vocab_size": 64, "hidden_size": 32, "intermediate_size": 40, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "pad_token_id": None,
}  # fmt: skip
HOSTS: dict[str, Any] = {
    "llama": lambda: LlamaForCausalLM(LlamaConfig(**SIZES)),
    "mistral": lambda: MistralForCausalLM(MistralConfig(**SIZES, sliding_window=None)),
    "qwen3": lambda: Qwen3ForCausalLM(Qwen3Config(**SIZES, head_dim=8)),
    "phi3": lambda: Phi3ForCausalLM(Phi3Config(**SIZES)),
}


@pytest.mark.parametrize("host", HOSTS)
@torch.no_grad()
def test_a_pattern_that_reads_everything_leaves_any_host_as_it_was(host: str) -> None:
    torch.manual_seed(0)
    model: Any = HOSTS[host]().double().eval()
    for name, parameter in model.named_parameters():
        if "norm" in name:
            parameter.add_(torch.randn_like(parameter) * 0.3)
    ids = torch.randint(0, 64, (2, 13))
    before, names = model(ids).logits, set(model.state_dict())
    shard_context(model, ShardPattern(2, 9, 2))
    assert (model(ids).logits - before).abs().max() < 1e-10
    assert set(model.state_dict()) == names
    shard_context(model, ShardPattern(2, 1, 2))
    assert (model(ids).logits - before).abs().max() > 1e-6
    shard_context(model, ShardPattern(2, 1, 2), dense_layers=[0, 1])
    assert (model(ids).logits - before).abs().max() < 1e-10
    tokens = model.generate(ids, max_new_tokens=3, do_sample=False)
    assert torch.equal(tokens, greedy(model, ids))


def greedy(model: Any, ids: Tensor) -> Tensor:
    """Three greedy tokens without a cache."""
    for _ in range(3):
        ids = torch.cat([ids, model(ids, use_cache=False).logits[:, -1:].argmax(-1)], 1)
    return ids


def test_a_pattern_is_kept_in_the_config_for_the_next_load(tmp_path: Any) -> None:
    model = LlamaForCausalLM(LlamaConfig(**SIZES)).eval()
    shard_context(model, ShardPattern(2, 1, 2), dense_layers=[1])
    model.save_pretrained(tmp_path)
    loaded = LlamaForCausalLM.from_pretrained(tmp_path)
    ids = torch.randint(0, 64, (1, 12))
    assert not torch.allclose(loaded(ids).logits, model(ids).logits)
    shard_context(loaded)
    torch.testing.assert_close(loaded(ids).logits, model(ids).logits)


def test_every_field_of_the_config_changes_the_network() -> None:
    ids = torch.randint(0, 255, (1, 30))
    changes = {"block_size": 3, "local_blocks": 1, "vert_stride": 1, "num_dense_heads": 1, "head_step": 0,
               "head_offset": 1, "dense_every": 2}  # fmt: skip
    logits = {}
    for name, value in {"none": None, **changes}.items():
        torch.manual_seed(0)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of coverage
            model: Any = create_model("test_s2", **({} if value is None else {name: value})).double().eval()
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.mul_(3 if parameter.ndim > 1 else 1)
            logits[name] = model(ids).logits
    for name in changes:
        assert (logits[name] - logits["none"]).abs().max() > 1e-6, name


def test_parameters_and_dense_layers_of_the_published_sizes() -> None:
    with torch.device("meta"):
        model: Any = create_model("s2_llama3_8b")
    assert sum(p.numel() for p in model.parameters()) == 8_030_261_248  # Llama 3 8B's
    assert model.config.dense_layers() == list(range(1, 32, 2))  # Phi-3-small's
    assert (model.config.block_size, model.config.local_blocks, model.config.vert_stride) == (64, 16, 8)
    assert VARIANTS["s2_llama3_8b"]["dense_every"] == 2


@torch.no_grad()
def test_what_does_not_fit_is_named() -> None:
    tiny: Any = create_model("test_s2").eval()
    ids = torch.randint(0, 255, (2, 6))
    state = tiny(ids, use_cache=True).past_key_values
    llama = LlamaForCausalLM(LlamaConfig(**SIZES))
    for call, words in [
        (lambda: ShardPattern(vert_stride=0), "ShardPattern: vert_stride must be at least 1, got vert_stride=0"),
        (lambda: ShardPattern(num_dense_heads=-1), "num_dense_heads must not be negative, got -1"),
        (lambda: ShardPattern().for_heads(4, 3), "num_heads must be a multiple of num_kv_heads, got 4 and 3"),
        (lambda: create_model("test_s2", num_dense_heads=3), "must not exceed the 2 key heads, got 3"),
        (lambda: S2LlamaConfig(dense_every=-1), "dense_every must not be negative, got -1"),
        (lambda: shard_context(llama), "give a pattern; the config of LlamaForCausalLM holds none"),
        (lambda: shard_context(llama, ShardPattern(), dense_layers=[2]), r"dense_layers must be in 0…1, got \[2\]"),
        (
            lambda: shard_context(BertLMHeadModel(BertConfig(**{**SIZES, "pad_token_id": 0})), ShardPattern()),
            "model must be Llama-like, a decoder whose layers have self_attn, got BertLMHeadModel",
        ),
        (
            lambda: shard_context(MistralForCausalLM(MistralConfig(**SIZES, sliding_window=4)), ShardPattern()),
            r"MistralAttention has a sliding window \(sliding_window\)",
        ),
        (lambda: tiny(ids, attention_mask=torch.ones(2, 1, 6, 6)), r"that of the padding \(B, M\), got \(2, 1, 6, 6\)"),
        (lambda: tiny(ids, position_ids=torch.tensor([[0, 1, 2, 0, 1, 2]]), use_cache=False), "packed sequences"),
        (lambda: tiny(ids[:1], past_key_values=state), "the cache holds 2 rows, got 1"),
        (lambda: state.crop(-1), "forgotten keys do not come back, got tokens_to_remove=-1"),
        (lambda: state.update(ids, ids, 0), "heads keep unequally many keys"),
        (
            lambda: tiny.generate(ids, max_new_tokens=2, prompt_lookup_num_tokens=2),
            "S2LlamaForCausalLM.generate: assisted decoding",
        ),
        (
            lambda: LlamaForCausalLM(LlamaConfig(**SIZES, attn_implementation="s2_attention"))(ids % 64),  # pyright: ignore[reportCallIssue]
            "attn_implementation='s2_attention' alone shards nothing",
        ),
    ]:
        with pytest.raises(ValueError, match=words):
            call()


def test_dropout_of_attention_is_refused_in_training() -> None:
    model: Any = create_model("test_s2", attention_dropout=0.1)
    ids = torch.randint(0, 255, (1, 6))
    assert model.eval()(ids).logits.shape == (1, 6, 256)
    with pytest.raises(ValueError, match=r"attention_dropout must be 0 in training, got 0\.1"):
        model.train()(ids)


@torch.no_grad()
def test_rows_of_a_cache_are_repeated_selected_and_forgotten() -> None:
    model: Any = create_model("test_s2").double().eval()
    ids = torch.randint(0, 255, (2, 9))
    state = model(ids, use_cache=True).past_key_values
    one = state.nbytes() // 2
    state.batch_repeat_interleave(2)
    assert state.nbytes() == 4 * one
    state.batch_select_indices(torch.tensor([2]))
    assert state.nbytes() == one
    step = model(ids[1:, :1], past_key_values=state).logits
    expected = model(torch.cat([ids[1:], ids[1:, :1]], 1)).logits[:, -1:]
    assert (step - expected).abs().max() < 1e-10
    state.reset()
    assert (state.nbytes(), state.get_seq_length()) == (0, 0)
    assert (model(ids, past_key_values=state).logits - model(ids).logits).abs().max() < 1e-10
