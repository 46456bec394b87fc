"""Eleven families of Hugging Face models: the identity equals SDPA, every method runs, nothing stays behind."""

import threading
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import AttentionInterface, DynamicCache
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from vlm_tools import ACT, AGLA, PAI, PAINT, VAR, VCD, Identity, LogitBoost, Method, intervene
from vlm_tools.testing.random_models import FAMILIES, VOCABULARY, random_inputs, random_model

pytestmark = pytest.mark.filterwarnings("ignore")  # transformers' own deprecations
METHODS: dict[str, Any] = {
    "var": lambda: VAR(dims=(3, 5), tau=1.1, summ=0.0, min_nonsink_ratio=0.0),
    "act": lambda: ACT(threshold=0.05, min_rows=2),
    "pai": lambda: PAI(0.5),
    "paint": lambda: PAINT(),
    "logit_boost": lambda: LogitBoost(1.0),
    "vcd": lambda: VCD(1.0),
    "agla": lambda: AGLA(),
}


@pytest.fixture(scope="module", params=FAMILIES)
def family(request: pytest.FixtureRequest) -> tuple[str, Any]:
    torch.manual_seed(0)
    return request.param, random_model(request.param)


def generate(model: Any, inputs: dict[str, Any], **options: Any) -> tuple[Tensor, ...]:
    out = model.generate(
        **inputs, max_new_tokens=3, do_sample=False, return_dict_in_generate=True, output_logits=True, **options
    )
    return out.logits


def largest(one: tuple[Tensor, ...], other: tuple[Tensor, ...]) -> float:
    return max(float((a - b).abs().max()) for a, b in zip(one, other, strict=True))


def second_row(inputs: dict[str, Any]) -> dict[str, Any]:
    """The second prompt of a batch of two, alone and without padding."""
    kept = inputs["attention_mask"][1].bool()
    alone = {}
    for name, value in inputs.items():
        if name.endswith(("_ids", "_mask")):
            alone[name] = value[1:][:, kept]
        else:
            alone[name] = value[len(value) // 2 :]
    return alone


def test_siblings_are_small(family: tuple[str, Any]) -> None:
    assert sum(parameter.numel() for parameter in family[1].parameters()) < 500_000


BEAMS, STATIC, SLOW = {"num_beams": 2}, {"cache_implementation": "static"}, pytest.mark.slow


# Without a mask, and with one beside each way of decoding; the others when slow tests are asked for.
@pytest.mark.parametrize(
    ("batch", "padding", "options"),
    [
        (1, 0, {}),
        (2, 3, BEAMS),
        (2, 3, STATIC),
        pytest.param(1, 0, BEAMS, marks=SLOW),
        pytest.param(1, 0, STATIC, marks=SLOW),
        pytest.param(2, 3, {}, marks=SLOW),
    ],
    ids=str,
)
def test_identity_equals_sdpa(family: tuple[str, Any], batch: int, padding: int, options: dict[str, Any]) -> None:
    name, model = family
    inputs = random_inputs(name, batch=batch, padding=padding)
    plain = generate(model, inputs, **options)
    assert max(float(step.abs().max()) for step in plain) > 0.3
    with intervene(model, Identity()):
        assert largest(plain, generate(model, inputs, **options)) <= 1e-5


def test_identity_equals_sdpa_in_a_chunked_prefill(family: tuple[str, Any]) -> None:
    name, model = family
    inputs = random_inputs(name, words=8)
    length = inputs["input_ids"].shape[1]

    def chunked() -> Tensor:
        cache = DynamicCache(config=model.config.get_text_config())
        first = {k: v[:, : length - 4] if k.endswith(("_ids", "_mask")) else v for k, v in inputs.items()}
        with torch.no_grad():
            model(**first, past_key_values=cache, use_cache=True)
            return model(
                input_ids=inputs["input_ids"][:, -4:],
                past_key_values=cache,
                use_cache=True,
                position_ids=None if name.startswith("test_qwen") else torch.arange(length - 4, length)[None],
            ).logits

    plain = chunked()
    with intervene(model, Identity()):
        assert float((plain - chunked()).abs().max()) <= 1e-5


# Every family with two methods, every method with three families; the others when slow tests are asked for.
PAIRS = [
    pytest.param(family, method, marks=() if (place + number) % 4 == 0 else pytest.mark.slow)
    for place, family in enumerate(FAMILIES)
    for number, method in enumerate(METHODS)
]


@pytest.mark.parametrize(("family", "method"), PAIRS, indirect=["family"])
def test_method_changes_generation_and_a_padded_row_is_as_alone(family: tuple[str, Any], method: str) -> None:
    name, model = family
    inputs = random_inputs(name, batch=2, padding=3)
    plain = model.generate(
        **inputs, max_new_tokens=3, do_sample=False, return_dict_in_generate=True, output_scores=True
    )
    chosen: Method = METHODS[method]()
    with intervene(model, chosen):
        changed = model.generate(
            **inputs, max_new_tokens=3, do_sample=False, return_dict_in_generate=True, output_scores=True
        )
        if chosen.changes_attention:
            with torch.no_grad():
                both = model(**inputs).logits[1, -1]
                alone = model(**second_row(inputs)).logits[0, -1]
            torch.testing.assert_close(both, alone, atol=2e-5, rtol=0)
    assert not torch.equal(plain.scores[0], changed.scores[0])


def test_model_is_as_before_after_an_exception(family: tuple[str, Any]) -> None:
    name, model = family
    inputs = random_inputs(name)
    plain = generate(model, inputs)
    hooks = {n: len(m._forward_pre_hooks) for n, m in model.named_modules()}
    with pytest.raises(RuntimeError, match="user's"), intervene(model, VAR(dims=(1,), tau=2.0)):
        raise RuntimeError("user's")
    assert model.get_decoder().config._attn_implementation == "sdpa"
    assert {n: len(m._forward_pre_hooks) for n, m in model.named_modules()} == hooks
    assert "generate" not in model.__dict__
    assert largest(plain, generate(model, inputs)) <= 1e-6


def test_models_in_two_threads_do_not_interfere() -> None:
    torch.manual_seed(0)
    models = {name: random_model(name) for name in ("test_llava", "test_smolvlm")}
    chosen: dict[str, Method] = {"test_llava": LogitBoost(2.0), "test_smolvlm": LogitBoost(-2.0)}
    want = {}
    for name, model in models.items():
        with intervene(model, chosen[name]):
            want[name] = generate(model, random_inputs(name))
    got: dict[str, float] = {}
    ready = threading.Barrier(2)

    def work(name: str) -> None:
        with intervene(models[name], chosen[name]):
            ready.wait()
            got[name] = max(largest(want[name], generate(models[name], random_inputs(name))) for _ in range(5))

    threads = [threading.Thread(target=work, args=(name,)) for name in models]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert max(got.values()) < 1e-5  # not 0: a thread of its own may share out its work in another way
    assert set(got) == set(models)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_methods_work_in_other_precisions(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    model: Any = random_model("test_llava")
    model.to(dtype)
    inputs = {k: v.to(dtype) if v.is_floating_point() else v for k, v in random_inputs("test_llava").items()}
    for name in ("var", "act", "pai", "paint", "logit_boost"):
        with torch.no_grad(), intervene(model, METHODS[name]()):
            assert model(**inputs).logits.dtype == dtype


def test_misuse_is_one_clear_line() -> None:
    model = random_model("test_llava")
    with (
        pytest.raises(ValueError, match="no adapter for a Linear; there are gemma3"),
        intervene(nn.Linear(1, 1), Identity()),  # pyright: ignore[reportArgumentType]
    ):
        pass
    with (
        pytest.raises(ValueError, match=r"method must be a Method such as VAR\(\), got 'var'"),
        intervene(model, "var"),  # pyright: ignore[reportArgumentType]
    ):
        pass
    twice = pytest.raises(ValueError, match="under another method already")
    with intervene(model, Identity()), twice, intervene(model, Identity()):
        pass
    ids = torch.tensor([[1, 5, 6]])
    with intervene(model, LogitBoost()):
        with pytest.raises(ValueError, match=r"row 0 of the prompt has no image token \(id 99\)"):
            model(input_ids=ids)
        with pytest.raises(ValueError, match="the prompt is empty"):
            model(input_ids=ids[:, :0])
        inputs = random_inputs("test_llava")
        with pytest.raises(ValueError, match="one image per prompt, got 2 images in 1 prompts"):
            model(input_ids=inputs["input_ids"], pixel_values=inputs["pixel_values"].repeat(2, 1, 1, 1))
        with pytest.raises(ValueError, match="called without input_ids"):
            model(inputs_embeds=torch.zeros(1, 3, 32))
    misfit = pytest.raises(ValueError, match=r"visual has shape \(1, 4\), the prompt \(1, 3\)")
    with intervene(model, LogitBoost(), visual=torch.ones(1, 4, dtype=torch.bool)), misfit:
        model(inputs_embeds=torch.zeros(1, 3, 32))
    with pytest.raises(ValueError, match="layers 0 … 3, got layers=\\[9\\]"), intervene(model, PAI(layers=[9])):
        pass
    AttentionInterface.register("maskless", sdpa_attention_forward)  # type: ignore[arg-type]
    model.set_attn_implementation("maskless")
    with pytest.raises(ValueError, match="'maskless' has no mask function"), intervene(model, Identity()):
        pass
    with pytest.raises(ValueError, match="unknown family 'x'"):
        random_model("x")
    with pytest.raises(ValueError, match="unknown family 'x'"):
        random_inputs("x")
    assert VOCABULARY == 100


def test_visual_mask_stands_for_missing_ids() -> None:
    torch.manual_seed(0)
    model = random_model("test_llava")
    embeds = torch.randn(1, 9, 32)
    visual = torch.zeros(1, 9, dtype=torch.bool)
    visual[:, 2:5] = True
    plain = model(inputs_embeds=embeds).logits
    with intervene(model, LogitBoost(3.0), visual=visual) as run:
        changed = model(inputs_embeds=embeds).logits
    torch.testing.assert_close(plain[:, :-1], changed[:, :-1], atol=1e-5, rtol=0)
    assert float((plain[:, -1] - changed[:, -1]).abs().max()) > 1e-3
    assert [row["layer"] for row in run.report()] == [1, 2, 3]
    assert all(row["edited"] == 4 and row["mass_moved"] > 0 for row in run.report())
