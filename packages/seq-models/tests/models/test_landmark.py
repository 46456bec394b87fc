"""Landmark attention: the grouped softmax, insertion of landmarks, retrieval with moved positions, official names."""

import itertools
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from seq_models import load_official
from seq_models.data import Passkey
from seq_models.language.task import LanguageTask, RetrievalHook
from seq_models.layers.rotary import rotate
from seq_models.models.landmark import VARIANTS, LandmarkConfig, LandmarkForCausalLM


def config(name: str = "test_landmark", **options: Any) -> LandmarkConfig:
    return LandmarkConfig(**{**VARIANTS[name], **options})


def model_of(settings: LandmarkConfig) -> Any:
    torch.manual_seed(0)
    model = LandmarkForCausalLM(settings).double().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.mul_(5)
    return model


def grouped(q: Tensor, k: Tensor, v: Tensor, q_at: int, spans: list[tuple[Tensor, int, bool]]) -> Tensor:
    """One query (D): ``spans`` are blocks of keys (row numbers), where each begins, and whether it is the own block."""
    weights, values, gates = [], [], []
    turned = rotate(q[None], torch.tensor([q_at]), 10000.0)[0]
    for rows, begin, own in spans:
        keys = rotate(k[rows], begin + torch.arange(len(rows)), 10000.0)
        score = keys @ turned * q.shape[-1] ** -0.5
        if own:
            weights.append(None)
            values.append(v[rows])
            gates.append(score)
        else:
            weights.append(score[:-1].softmax(0))
            values.append(v[rows][:-1])
            gates.append(score[-1:])
    mass = torch.cat(gates).softmax(0)
    out, at = torch.zeros_like(v[0]), 0
    for weight, value in zip(weights, values, strict=True):
        if weight is None:
            out = out + mass[at : at + len(value)] @ value
            at += len(value)
        else:
            out = out + mass[at] * (weight @ value)
            at += 1
    return out


@pytest.mark.parametrize("retrieval", ["per_token_and_head", "max_over_heads"])
@pytest.mark.parametrize("limit", [None, 0, 1, 2, 3])
@torch.no_grad()
def test_attention_equals_a_loop_over_queries(limit: int | None, retrieval: Any) -> None:
    """Grouped softmax over all blocks, or over those chosen by their landmarks, at the moved positions."""
    length, n = 4, 27
    attention = model_of(config(block=length, num_retrieved=limit, retrieval=retrieval)).model.layers[0].attn
    x = torch.randn(1, n, 32).double()
    q, k, v = (t.view(n, 4, 8).transpose(0, 1) for t in attention.c_attn(x)[0].chunk(3, -1))
    expected = torch.empty(4, n, 8).double()
    for i in range(n):
        before = i // length
        chance = torch.zeros(4, before)
        for h in range(4):
            if limit is None or before == 0:
                continue
            position = min(before, limit + 1) * length + i % length
            turned = rotate(q[h, i][None], torch.tensor([position]), 10000.0)[0]
            place = torch.tensor([max(0, j - max(before - limit - 1, 0)) for j in range(before)])
            keys = rotate(k[h, length - 1 :: length][:before], place * length + length - 1, 10000.0)
            chance[h] = (keys @ turned * 8**-0.5).log_softmax(0)
        for h in range(4):
            blocks = list(range(before))
            begins = [j * length for j in blocks]
            own_begin = before * length
            if limit is not None and before > limit:
                row = chance.amax(0) if retrieval == "max_over_heads" else chance[h]
                blocks = sorted(row.topk(limit).indices.tolist())
                begins = [(r + (j >= before - limit)) * length for r, j in enumerate(blocks)]
                own_begin = (limit + 1) * length
            spans = [
                (torch.arange(j * length, (j + 1) * length), b, False) for j, b in zip(blocks, begins, strict=True)
            ]
            own = torch.arange(before * length, min(i, before * length + length - 2) + 1)
            spans.append((own, own_begin, True))
            expected[h, i] = grouped(q[h, i], k[h], v[h], own_begin + i % length, spans)
    out, _ = attention(x, 0, None, False)
    reference = attention.c_proj(expected.transpose(0, 1).flatten(1))
    assert (out[0] - reference).abs().max() < 1e-10


@pytest.mark.parametrize("limit", [0, 1, 2, 9])
@torch.no_grad()
def test_the_best_blocks_are_read_where_they_are(limit: int) -> None:
    length, n = 4, 27
    settings = config(block=length, num_retrieved=limit, training_reads="best")
    attention = model_of(settings).train().model.layers[0].attn
    x = torch.randn(1, n, 32).double()
    q, k, v = (t.view(n, 4, 8).transpose(0, 1) for t in attention.c_attn(x)[0].chunk(3, -1))
    expected = torch.empty(4, n, 8).double()
    for i, h in itertools.product(range(n), range(4)):
        before = i // length
        turned = rotate(q[h, i][None], torch.tensor([i]), 10000.0)[0]
        at = length * torch.arange(before) + length - 1
        chosen = (rotate(k[h, at], at, 10000.0) @ turned).topk(min(limit, before)).indices.tolist()
        spans = [(torch.arange(j * length, (j + 1) * length), j * length, False) for j in chosen]
        own = torch.arange(before * length, min(i, before * length + length - 2) + 1)
        expected[h, i] = grouped(q[h, i], k[h], v[h], i, [*spans, (own, before * length, True)])
    out, _ = attention(x, 0, None, False)
    assert (out[0] - attention.c_proj(expected.transpose(0, 1).flatten(1))).abs().max() < 1e-10


@torch.no_grad()
def test_retrieval_of_all_blocks_equals_the_full_pass() -> None:
    model = model_of(config(block=5))
    ids = torch.randint(0, 255, (2, 23))
    full = model(ids).logits
    model.config.num_retrieved = 5  # of five
    assert (model(ids).logits - full).abs().max() < 1e-10


@torch.no_grad()
def test_training_reads_all_blocks_unless_it_retrieves() -> None:
    ids = torch.randint(0, 255, (2, 31))
    retrieved = model_of(config(block=4, num_retrieved=1))(ids).logits
    full = model_of(config(block=4))(ids).logits
    assert (retrieved - full).abs().max() > 1e-3
    for reads, expected in (("all", full), ("retrieved", retrieved)):
        model = model_of(config(block=4, num_retrieved=1, training_reads=reads)).train()
        assert (model(ids).logits - expected).abs().max() < 1e-10


@pytest.mark.parametrize("resumed_at", [0, 3, 4])
def test_training_goes_on_with_retrieval_and_longer_texts(resumed_at: int) -> None:
    task = LanguageTask(LandmarkForCausalLM(config(block=4, num_retrieved=1)))
    data = Passkey(length=120)
    runner = SimpleNamespace(bare_model=task, train_dataloader=SimpleNamespace(dataset=data), iter=resumed_at)
    hook, seen = RetrievalHook(begin=3, length=150), []
    hook.before_train(runner)
    for runner.iter in range(resumed_at, 5):
        seen.append((len(data[0]["input_ids"]), task.net.config.training_reads))
        hook.after_train_iter(runner, runner.iter)
    assert seen == [(120, "all")] * max(0, 3 - resumed_at) + [(150, "retrieved")] * min(2, 5 - resumed_at)


@torch.no_grad()
def test_model_inserts_landmarks_and_hides_them() -> None:
    """The user's tokens give what tokens with landmarks between them give to the layers."""
    model = model_of(config(block=4))
    ids = torch.randint(0, 255, (1, 10))
    mixed = torch.tensor([[*ids[0, :3], 255, *ids[0, 3:6], 255, *ids[0, 6:9], 255, ids[0, 9]]])
    x = model.model.embed_tokens(mixed)
    for layer in model.model.layers:
        x, _, _ = layer(x, 0, None, False)
    shown = model.lm_head(model.model.norm(x))[:, mixed[0] != 255]
    assert shown.shape[1] == 10
    assert (model(ids).logits - shown).abs().max() < 1e-10


@torch.no_grad()
def test_positions_at_retrieval_never_leave_the_window() -> None:
    """A thousand tokens later the same last blocks give the same result: nothing stands further away."""
    attention = model_of(config(block=4, num_retrieved=1)).model.layers[0].attn
    x = torch.randn(1, 40, 32).double()
    moved = torch.cat([x[:, :4].repeat(1, 200, 1), x], dim=1)
    short, _ = attention(torch.cat([x[:, :4], x], dim=1), 0, None, False)
    long, _ = attention(moved, 0, None, False)
    assert (short[:, -20:] - long[:, -20:]).abs().max() < 1e-10


@torch.no_grad()
def test_offloaded_state_gives_the_same_and_keeps_landmarks() -> None:
    ids = torch.randint(0, 255, (2, 31))
    results = []
    for offload in (False, True):
        model = model_of(config("test_landmark_retrieval", offload=offload))
        state = model(ids[:, :20], use_cache=True).past_key_values
        results.append(model(ids[:, 20:], past_key_values=state).logits)
        memory = state.groups[0].state[0]
        assert memory.keys.device.type == "cpu"
        assert memory.landmarks.shape[2] == memory.keys.shape[2] // 4
    assert (results[0] - results[1]).abs().max() < 1e-10


def test_official_names_come_back_and_strangers_are_refused() -> None:
    model = LandmarkForCausalLM(config())
    theirs = {}
    for key, value in model.state_dict().items():
        name = key.replace("model.layers.", "transformer.h.").replace("model.embed_tokens.", "transformer.wte.")
        theirs[name.replace("model.norm.", "transformer.ln_f.")] = value
    theirs["transformer.h.0.attn.bias"] = torch.ones(1, 1, 8, 8)
    theirs["transformer.wpe.freqs"] = torch.ones(4)
    other = LandmarkForCausalLM(config())
    load_official(other, {"model": {"_orig_mod." + key: value for key, value in theirs.items()}})
    other_state = other.state_dict()
    assert all(torch.equal(other_state[key], value) for key, value in model.state_dict().items())
    assert other.lm_head.weight is other.model.embed_tokens.weight
    with pytest.raises(ValueError, match=r"load_official: the given dict does not fit .*unexpected transformer\.x"):
        load_official(other, {**theirs, "transformer.x": torch.ones(1)})
    del theirs["transformer.h.1.ln_1.weight"]
    with pytest.raises(ValueError, match=r"missing transformer\.h\.1\.ln_1\.weight"):
        load_official(other, theirs)


def test_official_arguments_give_the_published_sizes() -> None:
    arguments = {"vocab_size": 50304, "n_embd": 1024, "n_layer": 12, "n_head": 8, "landmark_id": 50260, "mem_freq": 50}
    settings = LandmarkConfig.from_official(arguments)
    assert (settings.block, settings.landmark_id) == (51, 50260)
    with torch.device("meta"):
        model = LandmarkForCausalLM(settings)
    assert sum(p.numel() for p in model.parameters()) == 12 * (12 * 1024**2 + 2 * 1024) + 1024 + 50304 * 1024
    with pytest.raises(ValueError, match="from_official: arguments lack n_embd"):
        LandmarkConfig.from_official({"vocab_size": 1, "n_layer": 1, "n_head": 1, "landmark_id": 0, "mem_freq": 1})


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"block": 1}, "LandmarkConfig: block must be at least 2, a token and its landmark, got block=1"),
        ({"landmark_id": 256}, "landmark_id must be in 0…255"),
        ({"num_retrieved": -1}, "num_retrieved must not be negative"),
        ({"offload": True}, "offload needs num_retrieved"),
        ({"training_reads": "best"}, "training_reads needs num_retrieved"),
    ],
)
def test_sizes_that_do_not_fit_are_named(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        config(**options)


def turned(x: Tensor, position: Tensor) -> Tensor:
    """Rotary embedding by complex numbers; x (…, N, D)."""
    angle = position.double()[:, None] * 10000.0 ** (-torch.arange(0, x.shape[-1], 2).double() / x.shape[-1])
    return torch.view_as_real(
        torch.view_as_complex(x.unflatten(-1, (-1, 2)).contiguous()) * torch.polar(angle * 0 + 1, angle)
    ).flatten(-2)


def layer_norm(x: Tensor, weight: Tensor) -> Tensor:
    centered = x - x.mean(-1, keepdim=True)
    return weight * centered / (centered.square().mean(-1, keepdim=True) + 1e-5).sqrt()


def plain_logits(state: dict[str, Tensor], ids: Tensor, settings: LandmarkConfig) -> Tensor:
    """The whole network over one row, written out: nothing of the package, no operator of the core."""
    heads, length, content = settings.num_attention_heads, settings.block, settings.block - 1
    table = state["model.embed_tokens.weight"]
    mixed = [
        row
        for first in range(0, len(ids), content)
        for row in [*ids[first : first + content].tolist(), *[settings.landmark_id] * (len(ids) - first >= content)]
    ]
    x = table[mixed]
    n, width = x.shape
    at = torch.arange(n)
    for layer in range(settings.num_hidden_layers):
        p = {k.removeprefix(f"model.layers.{layer}."): v for k, v in state.items() if f".layers.{layer}." in k}
        projected = layer_norm(x, p["ln_1.weight"]) @ p["attn.c_attn.weight"].T
        q, k, v = projected.view(n, 3, heads, width // heads).permute(1, 2, 0, 3)
        scores = turned(q, at) @ turned(k, at).mT / (width // heads) ** 0.5
        out = torch.zeros_like(q)
        for i in range(n):
            before = i // length
            own = [j for j in range(before * length, i + 1) if j % length != content]
            ends = [j * length + content for j in range(before)]
            mass = scores[:, i, ends + own].softmax(-1)
            out[:, i] = torch.einsum("hm,hmd->hd", mass[:, before:], v[:, own])
            for j in range(before):
                inside = torch.arange(j * length, j * length + content)
                read = torch.einsum("hm,hmd->hd", scores[:, i, inside].softmax(-1), v[:, inside])
                out[:, i] += mass[:, j, None] * read
        x = x + out.transpose(0, 1).reshape(n, width) @ p["attn.c_proj.weight"].T
        inner = layer_norm(x, p["ln_2.weight"]) @ p["mlp.c_fc.weight"].T
        x = x + (inner * 0.5 * (1 + torch.erf(inner / 2**0.5))) @ p["mlp.c_proj.weight"].T
    return (layer_norm(x, state["model.norm.weight"]) @ table.T)[at % length != content]


@torch.no_grad()
def test_the_whole_network_equals_one_written_out() -> None:
    settings = config(block=4)
    model = model_of(settings)
    for parameter in model.parameters():
        if parameter.ndim == 1:
            parameter.add_(0.3 * torch.randn_like(parameter))
    ids = torch.randint(0, 255, (14,))
    expected = plain_logits(model.state_dict(), ids, settings)
    assert (model(ids[None]).logits[0] - expected).abs().max() < 1e-10
    state = model(ids[None, :6], use_cache=True).past_key_values
    assert (model(ids[None, 6:], past_key_values=state).logits[0] - expected[6:]).abs().max() < 1e-10
