"""The contract of Llama-like models whose attention this package changes: Hugging Face's tools work as on the host."""

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.data import Dataset
from transformers import AutoConfig, AutoModelForCausalLM

from seq_models.models import create_model

NAMES = ["test_s2", "test_s2_hybrid", "test_moh"]
COMPILED = [pytest.param("test_s2", marks=pytest.mark.slow), "test_moh"]
LENGTH = 19
EXACT = 1e-10  # float64
# transformers turns by angles in float32, and padding changes the positions that it turns by.
TURNED = 1e-6


@pytest.fixture(params=NAMES)
def model(request: pytest.FixtureRequest) -> Any:
    torch.manual_seed(0)
    net: Any = create_model(request.param).double().eval()
    with torch.no_grad():  # larger weights: what leaks, leaks visibly
        for parameter in net.parameters():
            if parameter.ndim > 1:
                parameter.mul_(3)
    return net


@pytest.fixture
def ids() -> Tensor:
    return torch.randint(0, 255, (3, LENGTH))


def padded(ids: Tensor) -> Tensor:
    mask = torch.ones_like(ids)
    mask[0, :6] = 0
    mask[1, :2] = 0
    return mask


@torch.no_grad()
def in_pieces(model: Any, ids: Tensor, cuts: list[int]) -> tuple[Tensor, Any]:
    state, logits = None, []
    for first, last in zip([0, *cuts], [*cuts, ids.shape[1]], strict=True):
        out = model(ids[:, first:last], past_key_values=state, use_cache=True)
        state = out.past_key_values
        logits.append(out.logits)
    return torch.cat(logits, 1), state


@pytest.mark.parametrize("cuts", [[1], [7], [4, 5, 16], list(range(1, LENGTH))], ids=str)
def test_any_split_gives_the_full_pass(model: Any, ids: Tensor, cuts: list[int]) -> None:
    with torch.no_grad():
        full = model(ids, use_cache=False).logits
    logits, state = in_pieces(model, ids, cuts)
    assert (logits - full).abs().max() < EXACT
    assert state.get_seq_length() == LENGTH


@torch.no_grad()
def test_future_tokens_change_nothing(model: Any, ids: Tensor) -> None:
    edited = ids.clone()
    edited[:, 12:] = (edited[:, 12:] + 1) % 255
    assert (model(ids).logits[:, :12] - model(edited).logits[:, :12]).abs().max() < EXACT


@torch.no_grad()
def test_padding_left_and_right_changes_nothing(model: Any, ids: Tensor) -> None:
    mask = torch.ones_like(ids)
    mask[0, :6] = 0
    mask[1, 11:] = 0
    out = model(ids, attention_mask=mask, use_cache=True)
    assert (out.logits[0, 6:] - model(ids[:1, 6:]).logits[0]).abs().max() < TURNED
    assert (out.logits[1, :11] - model(ids[1:2, :11]).logits[0]).abs().max() < TURNED
    assert (out.logits[2] - model(ids[2:]).logits[0]).abs().max() < TURNED


@torch.no_grad()
def test_branches_of_a_copied_state_do_not_interfere(model: Any, ids: Tensor) -> None:
    state = model(ids[:, :9], use_cache=True).past_key_values
    branch = copy.deepcopy(state)
    first = model(ids[:, 9:], past_key_values=state).logits
    again = model(ids[:, 9:], past_key_values=branch).logits
    assert torch.equal(first, again)


@torch.no_grad()
def test_reordered_state_is_the_state_of_the_reordered_rows(model: Any, ids: Tensor) -> None:
    mask = padded(ids)
    state = model(ids, attention_mask=mask, use_cache=True).past_key_values
    order = torch.tensor([2, 0, 0, 1])
    state.reorder_cache(order)
    expected = model(ids[order], attention_mask=mask[order], use_cache=True).past_key_values
    step, longer = ids[order, :1], torch.nn.functional.pad(mask[order], (0, 1), value=1)
    outs = [model(step, attention_mask=longer, past_key_values=each).logits for each in (state, expected)]
    assert (outs[0] - outs[1]).abs().max() < EXACT


@pytest.mark.parametrize(
    "options", [{}, {"num_beams": 3, "num_return_sequences": 2}, {"do_sample": True, "top_k": 5}], ids=str
)
@torch.no_grad()
def test_generation_with_a_state_equals_generation_without(model: Any, ids: Tensor, options: dict[str, Any]) -> None:
    mask, results = padded(ids), []
    settings = {"do_sample": False, "max_new_tokens": 3, "pad_token_id": 0, **options}
    for use_cache in (True, False):
        torch.manual_seed(3)
        results.append(model.generate(ids, attention_mask=mask, use_cache=use_cache, **settings))
    assert torch.equal(results[0], results[1])
    if not options:
        alone = model.generate(ids[:1, 6:], **settings)
        assert torch.equal(results[0][:1, LENGTH:], alone[:, LENGTH - 6 :])


@pytest.mark.parametrize("cut", [None, 8], ids=["at once", "with a state"])
@torch.no_grad()
def test_embeddings_give_what_their_tokens_give(model: Any, ids: Tensor, cut: int | None) -> None:
    mask, embedded = padded(ids), model.get_input_embeddings()(ids)
    results = []
    for inputs in ({"input_ids": ids}, {"inputs_embeds": embedded}):
        state = None
        if cut is not None:
            first = {name: value[:, :cut] for name, value in inputs.items()}
            state = model(**first, attention_mask=mask[:, :cut], use_cache=True).past_key_values
        rest = {name: value[:, cut or 0 :] for name, value in inputs.items()}
        results.append(model(**rest, attention_mask=mask, past_key_values=state, logits_to_keep=2).logits)
    assert (results[0] - results[1]).abs().max() < EXACT
    settings: dict[str, Any] = {"max_new_tokens": 3, "do_sample": False, "pad_token_id": 0}
    given = model.generate(inputs_embeds=embedded, attention_mask=mask, **settings)
    assert torch.equal(given[:, -3:], model.generate(ids, attention_mask=mask, **settings)[:, -3:])


def test_saved_model_comes_back_bit_for_bit(model: Any, ids: Tensor, tmp_path: Path) -> None:
    model.float().save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert type(loaded) is type(model)
    assert type(AutoConfig.from_pretrained(tmp_path)) is type(model.config)
    theirs = loaded.state_dict()
    assert all(torch.equal(value, theirs[key]) for key, value in model.state_dict().items())
    torch.testing.assert_close(model(ids).logits, loaded(ids).logits)


def test_checkpointed_gradients_equal_plain_ones(model: Any, ids: Tensor) -> None:
    model.train()
    gradients = []
    for checkpointing in (False, True):
        if checkpointing:
            model.activation_checkpointing_enable()
        model.zero_grad()
        model(ids, labels=ids).loss.backward()
        gradients.append([p.grad.clone() for p in model.parameters()])
    assert all((a - b).abs().max() < EXACT for a, b in zip(*gradients, strict=True))
    assert all(bool(grad.any()) for grad in gradients[0])


@torch.no_grad()
def test_half_precision_is_finite_and_keeps_its_dtype(model: Any, ids: Tensor) -> None:
    for dtype in (torch.bfloat16, torch.float16):
        logits = model.to(dtype)(ids).logits
        assert logits.dtype == dtype
        assert bool(logits.isfinite().all())


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")  # PEFT asks for it
def test_lora_trains_its_layers_alone_and_merges_into_them(model: Any, ids: Tensor) -> None:
    from peft import LoraConfig, get_peft_model

    wrapped: Any = get_peft_model(
        model, LoraConfig(r=2, target_modules=["q_proj", "v_proj", "o_proj"], task_type="CAUSAL_LM")
    )
    with torch.no_grad():
        for name, parameter in wrapped.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.3)
    out = wrapped(input_ids=ids, attention_mask=padded(ids), labels=ids)
    out.loss.backward()
    moved = {name for name, p in wrapped.named_parameters() if p.grad is not None and bool(p.grad.any())}
    assert moved == {name for name, p in wrapped.named_parameters() if "lora_" in name}
    generated = wrapped.generate(input_ids=ids[:, :7], max_new_tokens=3, do_sample=False, pad_token_id=0)
    merged = wrapped.merge_and_unload()
    with torch.no_grad():
        assert (merged(ids, attention_mask=padded(ids)).logits - out.logits).abs().max() < EXACT
    assert torch.equal(merged.generate(ids[:, :7], max_new_tokens=3, do_sample=False, pad_token_id=0), generated)


class Rows(Dataset[dict[str, Tensor]]):
    """Rows of one text, padded and counted unequally."""

    def __init__(self) -> None:
        torch.manual_seed(1)
        self.ids = torch.randint(0, 250, (4, 12))

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        ids, mask = self.ids[index], torch.ones(12, dtype=torch.long)
        mask[: index % 4] = 0
        return {"input_ids": ids, "attention_mask": mask, "labels": ids.masked_fill(mask == 0, -100)}


def test_trainer_with_accumulated_gradients_takes_the_steps_of_whole_batches(model: Any, tmp_path: Path) -> None:
    from transformers import Trainer, TrainingArguments

    ends = []
    for batch, parts in ((4, 1), (1, 4)):
        net = copy.deepcopy(model)
        arguments = TrainingArguments(
            str(tmp_path), max_steps=1, per_device_train_batch_size=batch, gradient_accumulation_steps=parts,
            learning_rate=1e-3, report_to="none", save_strategy="no", disable_tqdm=True, use_cpu=True, optim="sgd",
            lr_scheduler_type="constant", max_grad_norm=0.0, logging_strategy="no",
        )  # fmt: skip
        before = net.lm_head.weight.detach().clone()
        Trainer(net, arguments, train_dataset=Rows()).train()
        ends.append(net.lm_head.weight.detach() - before)
    assert ends[0].abs().max() > 0
    assert (ends[1] - ends[0]).abs().max() < 1e-5 * ends[0].abs().max()


@pytest.mark.compile
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")  # dynamo reads it
@pytest.mark.parametrize("name", COMPILED)
def test_compiled_models_give_the_same_logits_and_gradients(name: str, ids: Tensor) -> None:
    torch.manual_seed(0)
    model: Any = create_model(name, num_hidden_layers=1).double()
    compiled: Any = torch.compile(model, backend="aot_eager")
    results = []
    for call in (model, compiled):
        model.zero_grad()
        out = call(ids, labels=ids, use_cache=False)
        out.loss.backward()
        results.append((out.logits.detach(), model.lm_head.weight.grad.clone()))
    assert (results[0][0] - results[1][0]).abs().max() < EXACT
    assert (results[0][1] - results[1][1]).abs().max() < EXACT


@torch.no_grad()
def test_what_is_not_offered_is_refused_by_name(model: Any, ids: Tensor) -> None:
    with pytest.raises(ValueError, match="output_attentions must be None or False, got True"):
        model(ids, output_attentions=True)
