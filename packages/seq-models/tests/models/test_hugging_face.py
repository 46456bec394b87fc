"""What Hugging Face's tools ask of every causal language model: embeddings, generate, Trainer, PEFT, compile, files."""

import functools
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.data import Dataset

from seq_models.models import create_model

EXACT = 1e-10  # float64
FAMILIES = [
    "test_gaussian",
    "test_landmark",
    "test_rcmha",
    "test_routing",
    "test_scatterbrain",
    "test_titans_mac",
    "test_transnormer",
]
# One family each time, the others when slow tests are asked for.
OFTEN = [pytest.param(name, marks=() if name == "test_rcmha" else pytest.mark.slow) for name in FAMILIES]


def padded(ids: Tensor) -> Tensor:
    """A mask that pads rows 0 and 1 on the left."""
    mask = torch.ones_like(ids)
    mask[0, :6] = 0
    mask[1, :2] = 0
    return mask


SOME = torch.tensor([3, 17, 18])
SLOW = pytest.mark.slow


# One code cuts the logits of all models: each value with and without a state is asked for among the slow tests.
@pytest.mark.parametrize(
    ("cut", "keep"),
    [
        pytest.param(None, SOME, id="at once-a list"),
        pytest.param(8, 2, id="with a state-last two"),
        pytest.param(None, 0, id="at once-all", marks=SLOW),
        pytest.param(None, 2, id="at once-last two", marks=SLOW),
        pytest.param(8, 0, id="with a state-all", marks=SLOW),
        pytest.param(8, SOME, id="with a state-a list", marks=SLOW),
    ],
)
@torch.no_grad()
def test_embeddings_give_what_their_tokens_give(model: Any, ids: Tensor, cut: int | None, keep: Any) -> None:
    mask = padded(ids)
    embedded = model.get_input_embeddings()(ids)
    state: dict[str, Any] = {"tokens": None, "embeddings": None}
    first = 0
    if cut is not None:
        first, keep = cut, keep if isinstance(keep, int) else keep[1:] - cut
        for kind, inputs in (("tokens", {"input_ids": ids}), ("embeddings", {"inputs_embeds": embedded})):
            part = {name: value[:, :cut] for name, value in inputs.items()}
            out = model(**part, attention_mask=mask[:, :cut], use_cache=True)
            state[kind] = out.past_key_values
    rest: dict[str, Any] = {"attention_mask": mask, "logits_to_keep": keep, "labels": ids[:, first:]}
    tokens = model(ids[:, first:], past_key_values=state["tokens"], **rest)
    given = model(inputs_embeds=embedded[:, first:], past_key_values=state["embeddings"], **rest)
    assert (tokens.logits - given.logits).abs().max() < EXACT
    assert (tokens.loss - given.loss).abs() < EXACT
    whole = model(ids, attention_mask=mask).logits[:, first:]
    kept = whole[:, -keep:] if isinstance(keep, int) and keep else whole if isinstance(keep, int) else whole[:, keep]
    assert (tokens.logits - kept).abs().max() < EXACT


# Without beams the same states go through fewer steps (and test_every_causal_model.py generates so).
@pytest.mark.parametrize("beams", [pytest.param(1, marks=SLOW), 3])
@torch.no_grad()
def test_a_padded_batch_generates_what_each_row_generates_alone(model: Any, ids: Tensor, beams: int) -> None:
    """Left padding × beams × state × tokens or embeddings × one or all returned sequences."""
    ids = ids[:2]
    mask, new = padded(ids), 3
    settings: dict[str, Any] = {"num_beams": beams, "do_sample": False, "max_new_tokens": new, "pad_token_id": 0}
    alone = []
    for row in range(len(ids)):
        tokens = ids[row : row + 1, mask[row].bool()]
        seen = torch.ones_like(tokens)  # generate would take a token 0 for padding
        alone.append(model.generate(tokens, attention_mask=seen, num_return_sequences=beams, **settings)[:, -new:])
    every = model.generate(ids, attention_mask=mask, num_return_sequences=beams, **settings)[:, -new:]
    assert torch.equal(every, torch.cat(alone))
    best = every[::beams]
    assert torch.equal(model.generate(ids, attention_mask=mask, use_cache=False, **settings)[:, -new:], best)
    embedded = model.get_input_embeddings()(ids)
    for use_cache in (True, False):  # generate itself switches the state on where a prompt is of embeddings
        given = model.generate(inputs_embeds=embedded, attention_mask=mask, use_cache=use_cache, **settings)
        assert torch.equal(given[:, -new:], best)


@torch.no_grad()
def test_hidden_states_of_a_padded_row_are_those_of_the_row_alone(model: Any, ids: Tensor) -> None:
    mask = padded(ids)
    out = model.model(ids, attention_mask=mask, output_hidden_states=True)
    alone = model.model(ids[:1, 6:], output_hidden_states=True)
    assert len(out.hidden_states) == model.config.num_hidden_layers + 1
    for ours, theirs in zip(out.hidden_states, alone.hidden_states, strict=True):
        assert (ours[0, 6:] - theirs[0]).abs().max() < EXACT
        assert not ours[0, :6].any()
    assert torch.equal(out.hidden_states[-1], out.last_hidden_state)


@torch.no_grad()
def test_losses_of_parts_with_the_number_of_items_add_up_to_the_loss_of_all(model: Any, ids: Tensor) -> None:
    labels = ids.masked_fill(padded(ids) == 0, -100)
    items = int((labels[:, 1:] != -100).sum())
    split = [(ids[rows], labels[rows]) for rows in (slice(0, 1), slice(1, 3))]
    parts = [model(part, labels=target, num_items_in_batch=items).loss for part, target in split]
    assert (sum(parts) - model(ids, labels=labels).loss).abs() < EXACT
    one = model(ids, labels=labels, num_items_in_batch=torch.tensor(items)).loss
    assert (one - model(ids, labels=labels).loss).abs() < EXACT


def test_the_model_s_own_loss_is_shared_over_items_too() -> None:
    model: Any = create_model("test_routing").double().train()
    ids, items = torch.randint(0, 256, (2, 12)), 40
    before = {key: value.clone() for key, value in model.state_dict().items()}
    mean = model(ids, labels=ids)
    model.load_state_dict(before)
    shared = model(ids, labels=ids, num_items_in_batch=items)
    assert mean.auxiliary_loss > 0
    assert (shared.loss - mean.loss * 22 / items).abs() < EXACT


@torch.no_grad()
def test_what_no_recurrence_offers_is_refused_by_name(model: Any, ids: Tensor) -> None:
    name, embedded = type(model).__name__, model.get_input_embeddings()(ids)
    generate = functools.partial(model.generate, ids[:1], max_new_tokens=2)
    for call, words in [
        (lambda: model(ids, output_attentions=True), "output_attentions must be None or False, got True"),
        (lambda: model.model(ids, output_attentions=True), "output_hidden_states=True gives what every layer"),
        (lambda: model(ids, logits_to_keep=-1), f"{name}: logits_to_keep must not be negative, got -1"),
        (lambda: model(inputs_embeds=embedded[..., :5]), r"inputs_embeds must be numbers \(B, N, 32\) with N ≥ 1"),
        (lambda: model(inputs_embeds=embedded[:, :0]), r"got \(3, 0, 32\)"),
        (lambda: generate(assistant_model=model), f"{name}.generate: assisted decoding"),
        (lambda: generate(prompt_lookup_num_tokens=2), "takes tokens back, which a recurrent state cannot"),
    ]:
        with pytest.raises(ValueError, match=words):
            call()
    assert model(ids, output_attentions=False).attentions is None


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")  # PEFT asks for it
@pytest.mark.parametrize("targets", ["all-linear", pytest.param("attention", marks=SLOW)])  # a part of them all
def test_lora_trains_its_layers_alone_and_merges_into_them(model: Any, ids: Tensor, targets: str) -> None:
    from peft import LoraConfig, get_peft_model

    linear = {name for name, module in model.model.named_modules() if isinstance(module, torch.nn.Linear)}
    mixing = ("attention", "attn", "memory", "token_mixer")
    chosen: Any = sorted(name for name in linear if any(word in name for word in mixing))
    wrapped: Any = get_peft_model(
        model,
        LoraConfig(r=2, target_modules=chosen if targets == "attention" else targets, task_type="CAUSAL_LM"),
    )
    adapted = {name for name, _ in model.model.named_parameters() if "lora_B" in name}
    assert len(adapted) == len(chosen if targets == "attention" else linear)
    with torch.no_grad():
        for name, parameter in wrapped.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.3)
    out = wrapped(input_ids=ids, attention_mask=padded(ids), labels=ids)
    out.loss.backward()
    with_gradient = {name for name, p in wrapped.named_parameters() if p.grad is not None and bool(p.grad.any())}
    assert with_gradient == {name for name, p in wrapped.named_parameters() if "lora_" in name}
    generated = wrapped.generate(input_ids=ids[:, :7], max_new_tokens=3, do_sample=False, pad_token_id=0)
    merged = wrapped.merge_and_unload()
    with torch.no_grad():
        assert (merged(ids, attention_mask=padded(ids)).logits - out.logits).abs().max() < EXACT
    assert torch.equal(merged.generate(ids[:, :7], max_new_tokens=3, do_sample=False, pad_token_id=0), generated)


class Rows(Dataset[dict[str, Tensor]]):
    """Rows of one text, padded and counted unequally."""

    def __init__(self) -> None:
        torch.manual_seed(1)
        self.ids = torch.randint(0, 250, (8, 12))

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        ids, mask = self.ids[index], torch.ones(12, dtype=torch.long)
        mask[: index % 4] = 0
        return {"input_ids": ids, "attention_mask": mask, "labels": ids.masked_fill(mask == 0, -100)}


@pytest.mark.parametrize("name", OFTEN)
def test_trainer_with_accumulated_gradients_takes_the_steps_of_whole_batches(name: str, tmp_path: Path) -> None:
    from transformers import Trainer, TrainingArguments

    ends = []
    for batch, parts in ((4, 1), (2, 2), (1, 4)):
        torch.manual_seed(0)
        net: Any = create_model(name).double()
        if name == "test_routing":
            net.config.commitment = 0.0  # k-means sees other batches
            for layer in net.model.layers:
                layer.attention.centroids.decay = 1.0 - 1e-12
        arguments = TrainingArguments(
            str(tmp_path), max_steps=2, per_device_train_batch_size=batch, gradient_accumulation_steps=parts,
            learning_rate=1e-3, report_to="none", save_strategy="no", disable_tqdm=True, use_cpu=True, optim="sgd",
            lr_scheduler_type="constant", max_grad_norm=0.0, logging_strategy="no",
        )  # fmt: skip
        before = net.lm_head.weight.detach().clone()
        Trainer(net, arguments, train_dataset=Rows()).train()
        ends.append(net.lm_head.weight.detach() - before)
    assert ends[0].abs().max() > 0
    for other in ends[1:]:
        assert (other - ends[0]).abs().max() < 1e-6 * ends[0].abs().max()


@pytest.mark.compile
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")  # dynamo reads it
@pytest.mark.parametrize("name", OFTEN)
def test_compiled_models_give_the_same_logits_and_gradients(name: str) -> None:
    torch.manual_seed(0)
    model: Any = create_model(name, num_hidden_layers=1).double()
    ids = torch.randint(0, 250, (2, 12))
    before = {key: value.clone() for key, value in model.state_dict().items()}
    compiled: Any = torch.compile(model, backend="aot_eager")
    results = []
    for call in (model, compiled):
        model.zero_grad()
        model.load_state_dict(before)  # training moves centroids
        out = call(ids, labels=ids, use_cache=False)
        out.loss.backward()
        results.append((out.logits.detach(), model.lm_head.weight.grad.clone()))
    assert (results[0][0] - results[1][0]).abs().max() < EXACT
    assert (results[0][1] - results[1][1]).abs().max() < EXACT


def test_a_fresh_process_finds_the_classes_once_the_package_is_imported(tmp_path: Path) -> None:
    for name in FAMILIES:
        model: Any = create_model(name)
        model.save_pretrained(tmp_path / name)
    program = f"""
from pathlib import Path
from transformers import AutoModelForCausalLM
folders = [Path({str(tmp_path)!r}) / name for name in {FAMILIES}]
for folder in folders:
    try:
        AutoModelForCausalLM.from_pretrained(folder)
    except ValueError as error:
        assert "model type `attn_" in str(error), error
        print("unknown")
import seq_models
for folder in folders:
    print(type(AutoModelForCausalLM.from_pretrained(folder)).__name__)
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, encoding="utf-8", check=False)
    families = ("Gaussian", "Landmark", "RCMHA", "Routing", "Scatterbrain", "Titans", "TransNormer")
    names = [f"{name}ForCausalLM" for name in families]
    assert done.stdout.split() == ["unknown"] * 7 + names, done.stderr
