"""The contract of every causal language model: what a state is, padding, packing, generation, files, errors."""

import itertools
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM

from seq_models.language.language_model import SequenceState
from seq_models.models import create_model

EXACT = 1e-10  # float64


LENGTH = 19


def close(a: Tensor, b: Tensor) -> bool:
    return bool((a - b).abs().max() < EXACT)


@torch.no_grad()
def in_pieces(model: Any, ids: Tensor, cuts: list[int]) -> tuple[Tensor, SequenceState]:
    state: Any = None
    logits = []
    for first, last in zip([0, *cuts], [*cuts, ids.shape[1]], strict=True):
        out = model(ids[:, first:last], past_key_values=state, use_cache=True)
        state = out.past_key_values
        logits.append(out.logits)
    return torch.cat(logits, 1), state


@pytest.mark.parametrize("cuts", [[1], [7], [4, 5, 16], list(range(1, LENGTH))], ids=str)
def test_any_split_gives_the_full_pass(model: Any, ids: Tensor, cuts: list[int]) -> None:
    with torch.no_grad():
        full = model(ids).logits
    logits, state = in_pieces(model, ids, cuts)
    assert close(logits, full)
    assert state.lengths() == [LENGTH] * 3


@torch.no_grad()
def test_future_tokens_change_nothing(model: Any, ids: Tensor) -> None:
    edited = ids.clone()
    edited[:, 12:] = (edited[:, 12:] + 1) % (model.config.vocab_size - 1)
    assert close(model(ids).logits[:, :12], model(edited).logits[:, :12])


@torch.no_grad()
def test_padding_left_and_right_changes_nothing(model: Any, ids: Tensor) -> None:
    mask = torch.ones_like(ids)
    mask[0, :6] = 0
    mask[1, 11:] = 0
    out = model(ids, attention_mask=mask, use_cache=True)
    assert close(out.logits[0, 6:], model(ids[:1, 6:]).logits[0])
    assert close(out.logits[1, :11], model(ids[1:2, :11]).logits[0])
    assert close(out.logits[2], model(ids[2:]).logits[0])
    assert out.past_key_values.lengths() == [13, 11, LENGTH]
    step = model(ids[:, :1], past_key_values=out.past_key_values).logits
    assert close(step[1], model(torch.cat([ids[1:2, :11], ids[1:2, :1]], 1)).logits[0, -1:])


@torch.no_grad()
def test_packed_sequences_are_separate(model: Any, ids: Tensor) -> None:
    bounds = torch.tensor([0, 5, 12, LENGTH])
    packed = model(ids[:1], cu_seqlens=bounds, labels=ids[:1])
    parts = [ids[:1, a:b] for a, b in itertools.pairwise(bounds.tolist())]
    alone = [model(part, labels=part) for part in parts]
    assert close(packed.logits, torch.cat([out.logits for out in alone], 1))
    expected = sum(out.loss * (part.shape[1] - 1) for out, part in zip(alone, parts, strict=True)) / (LENGTH - 3)
    assert abs(float(packed.loss - expected)) < EXACT


@torch.no_grad()
def test_interleaved_streams_and_branches_do_not_interfere(model: Any, ids: Tensor) -> None:
    a, b = ids[:1], ids[1:2]
    first = model(a[:, :9], use_cache=True).past_key_values
    other = model(b[:, :4], use_cache=True).past_key_values
    second = model(a[:, 9:], past_key_values=first, use_cache=True).logits
    model(b[:, 4:], past_key_values=other, use_cache=True)
    again = model(a[:, 9:], past_key_values=first, use_cache=True).logits
    assert torch.equal(second, again)
    assert close(second, model(a).logits[:, 9:])


@torch.no_grad()
def test_reordered_state_is_the_state_of_the_reordered_rows(model: Any, ids: Tensor) -> None:
    mask = torch.ones_like(ids)
    mask[0, :6] = 0
    state = model(ids, attention_mask=mask, use_cache=True).past_key_values
    order = torch.tensor([2, 0, 0, 1])
    state.reorder_cache(order)
    assert state.batch_size == 4
    expected = model(ids[order], attention_mask=mask[order], use_cache=True).past_key_values
    step = ids[order, :1]
    assert close(model(step, past_key_values=state).logits, model(step, past_key_values=expected).logits)


SAMPLED = pytest.param({"do_sample": True, "top_k": 5}, marks=pytest.mark.slow)  # the steps of the greedy one


@pytest.mark.parametrize("options", [{}, {"num_beams": 3}, SAMPLED], ids=str)
def test_generation_with_a_state_equals_generation_without(model: Any, ids: Tensor, options: dict[str, Any]) -> None:
    mask = torch.ones_like(ids)
    mask[0, :6] = 0
    results = []
    for use_cache in (True, False):
        torch.manual_seed(3)
        settings = {"do_sample": False, "max_new_tokens": 3, "pad_token_id": 0, "use_cache": use_cache, **options}
        results.append(model.generate(ids, attention_mask=mask, **settings))
    assert torch.equal(results[0], results[1])
    alone = model.generate(ids[:1, 6:], max_new_tokens=3, do_sample=False, pad_token_id=0)
    if not options:
        assert torch.equal(results[0][:1, LENGTH:], alone[:, LENGTH - 6 :])


def test_saved_model_comes_back_bit_for_bit(model: Any, ids: Tensor, tmp_path: Path) -> None:
    model.float().save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert type(loaded) is type(model)
    assert type(AutoConfig.from_pretrained(tmp_path)) is type(model.config)
    assert type(AutoModel.from_pretrained(tmp_path)) is type(model.model)
    ours, theirs = model.state_dict(), loaded.state_dict()
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(value, theirs[key]) for key, value in ours.items())
    torch.testing.assert_close(model(ids).logits, loaded(ids).logits)  # mapped weights lie elsewhere: other kernels


def test_checkpointed_gradients_equal_plain_ones(model: Any, ids: Tensor) -> None:
    model.train()
    states = {key: value.clone() for key, value in model.state_dict().items()}
    gradients = []
    for checkpointing in (False, True):
        model.load_state_dict(states)
        if checkpointing:
            model.activation_checkpointing_enable()
        model.zero_grad()
        torch.manual_seed(1)  # centroids may start from random tokens
        model(ids, labels=ids).loss.backward()
        gradients.append([p.grad.clone() for p in model.parameters() if p.grad is not None])
    assert len(gradients[0]) == len(gradients[1]) > 0
    assert all(close(a, b) for a, b in zip(*gradients, strict=True))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@torch.no_grad()
def test_half_precision_is_finite_and_keeps_its_dtype(model: Any, ids: Tensor, dtype: torch.dtype) -> None:
    logits = model.to(dtype)(ids).logits
    assert logits.dtype == dtype
    assert bool(logits.isfinite().all())


def test_every_parameter_gets_a_gradient(model: Any, ids: Tensor) -> None:
    model.train()
    model(ids, labels=ids).loss.backward()
    dead = [name for name, p in model.named_parameters() if p.grad is None or not bool(p.grad.abs().sum() > 0)]
    assert not dead


@torch.no_grad()
def test_hidden_states_and_kept_logits(model: Any, ids: Tensor) -> None:
    out = model(ids, output_hidden_states=True)
    assert len(out.hidden_states) == model.config.num_hidden_layers + 1
    assert close(model(ids, logits_to_keep=2).logits, out.logits[:, -2:])
    assert isinstance(model(ids, return_dict=False), tuple)


@torch.no_grad()
def test_bad_input_is_named(model: Any, ids: Tensor) -> None:
    vocabulary = model.config.vocab_size
    state = model(ids, use_cache=True).past_key_values
    for arguments, message in [
        ({"input_ids": ids + vocabulary}, rf"input_ids must be in 0…{vocabulary - 1}, got {vocabulary}|got \d+"),
        ({"input_ids": ids[:, :0]}, r"input_ids holds no tokens, got shape \(3, 0\)"),
        ({"input_ids": ids.float()}, "input_ids must be integers"),
        ({}, "give either input_ids or inputs_embeds"),
        ({"input_ids": ids[:2], "past_key_values": state}, "state of 3 rows, got 2"),
        ({"input_ids": ids, "past_key_values": (1, 2)}, "must be the SequenceState of an earlier call, got tuple"),
        ({"input_ids": ids, "attention_mask": torch.ones(3, 4)}, r"attention_mask must be \(3, at least 19\)"),
        ({"input_ids": ids, "labels": ids[:, 1:]}, r"labels must be \(3, 19\), got \(3, 18\)"),
        ({"input_ids": ids, "cu_seqlens": torch.tensor([0, LENGTH])}, "cu_seqlens goes with one row"),
        ({"input_ids": ids[:1], "cu_seqlens": torch.tensor([0, 5])}, "must rise from 0 to the 19 tokens"),
    ]:
        with pytest.raises(ValueError, match=message):
            model(**arguments)
    with pytest.raises(ValueError, match="a state cannot forget its last tokens"):
        state.crop(1)
    with pytest.raises(ValueError, match="num_hidden_layers must be at least 1"):
        type(model.config)(num_hidden_layers=0)


@torch.no_grad()
def test_state_reports_its_bytes_and_can_be_reset(model: Any, ids: Tensor) -> None:
    state = model(ids, use_cache=True).past_key_values
    one = state.select(torch.tensor([1]))
    assert state.nbytes() == 3 * one.nbytes() > 0
    one.batch_repeat_interleave(2)
    assert one.lengths() == [LENGTH, LENGTH]
    state.batch_select_indices(torch.tensor([0]))
    assert state.batch_size == 1
    state.reset()
    assert (state.nbytes(), state.lengths()) == (0, [0])
    assert close(model(ids[:1], past_key_values=state).logits, model(ids[:1]).logits)


# Option → another value. With the same weights it changes the logits, or it changes the weights' shapes.
OPTIONS: dict[str, dict[str, Any]] = {
    "test_gaussian": {"gaussian_heads": 2, "num_gaussians": 1, "feedforward_size": 40, "rope_theta": 100.0},
    "test_landmark": {"block": 4, "landmark_id": 7, "num_retrieved": 1, "rope_theta": 100.0},
    "test_landmark_retrieval": {"num_retrieved": 1, "retrieval": "max_over_heads"},
    "test_rcmha": {
        "attention": "rmha", "positions": 3, "feedforward_size": 40, "sinusoids": True, "tie_word_embeddings": True,
    },
    "test_routing": {
        "num_local_heads": 1, "first_routing_layer": 1, "num_clusters": 2, "window": 2, "local_block": 3,
        "selection": "topk", "style": "lucidrains", "feedforward_size": 40, "rope_theta": 100.0,
    },
    "test_scatterbrain": {
        "window": 2, "num_features": 4, "support": "sparse", "feedforward_size": 40, "rope_theta": 100.0,
    },
    "test_titans_mag": {
        "architecture": "mal", "memory_depth": 1, "memory_expansion": 1, "chunk_size": 1, "window": 2,
        "num_persistent": 1, "conv_size": 2, "theta_max": 0.5, "momentum": False, "forgetting": False, "mlp_size": 40,
    },
    "test_transnormer": {
        "mixer_size": 64, "glu_size": 40, "lrpe_layers": [0, 1], "style": "example", "scale_embedding": False,
        "use_bias": True, "eps": 0.5, "num_attention_heads": 2, "num_hidden_layers": 3, "hidden_size": 16,
        "vocab_size": 300, "tie_word_embeddings": False, "initializer_range": 0.1,
    },
}  # fmt: skip
ELSEWHERE = {"training_reads", "offload", "ema_decay", "commitment"}  # training, memory: tests of their families


@pytest.mark.parametrize(("name", "option"), [(name, option) for name, some in OPTIONS.items() for option in some])
@torch.no_grad()
def test_every_option_changes_the_network(name: str, option: str) -> None:
    ids, nets = torch.randint(0, 255, (1, LENGTH)), []
    for changes in ({}, {option: OPTIONS[name][option]}):
        torch.manual_seed(0)
        net: Any = create_model(name, **changes).double().eval()
        nets.append(net)
    base, other = nets
    shapes = [{key: value.shape for key, value in net.state_dict().items()} for net in nets]
    if shapes[0] == shapes[1]:
        if option not in ("initializer_range", "tie_word_embeddings"):  # these are the weights
            for parameter in base.parameters():
                parameter.add_(0.3 * torch.randn_like(parameter))  # far from the small ones of the start
            other.load_state_dict(base.state_dict())
        assert (base(ids).logits - other(ids).logits).abs().max() > 1e-6


def test_the_table_of_options_names_every_field() -> None:
    for name, some in OPTIONS.items():
        config: Any = type(create_model(name).config)
        own = set(config.__annotations__) - {"model_type"} - ELSEWHERE
        others = {option for other, more in OPTIONS.items() if other.startswith(name) for option in more}
        if not name.endswith("_retrieval"):
            assert own <= others | set(some), name
