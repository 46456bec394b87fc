"""Random decoders of Hugging Face over attn_core.attention: the logits of SDPA, whatever hides tokens, or a refusal."""

# pyright: reportCallIssue=false, reportArgumentType=false
# (transformers fills the fields of its configurations in at run time)

import importlib.util
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import (
    BertConfig,
    BertModel,
    Gemma2Config,
    Gemma2ForCausalLM,
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    GPT2Config,
    GPT2LMHeadModel,
    GptOssConfig,
    GptOssForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
    T5Config,
    T5ForConditionalGeneration,
)

from attn_core import use_backend
from attn_core.compat import transformers_attention

pytestmark = pytest.mark.filterwarnings("ignore")  # transformers' own deprecations
SIZES: dict[str, Any] = {
    "vocab_size": 50,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": None,
}
LAYERS = {"sliding_window": 4, "layer_types": ["sliding_attention", "full_attention"]}
DECODERS: dict[str, Callable[[], Any]] = {
    "llama": lambda: LlamaForCausalLM(LlamaConfig(**SIZES)),
    "mistral, windows of 4": lambda: MistralForCausalLM(MistralConfig(**SIZES, sliding_window=4)),
    "qwen3": lambda: Qwen3ForCausalLM(Qwen3Config(**SIZES)),
    "gemma3, windows in every second layer": lambda: Gemma3ForCausalLM(
        Gemma3TextConfig(**SIZES, **LAYERS, query_pre_attn_scalar=64)
    ),
    "gpt2, scaled by layer": lambda: GPT2LMHeadModel(
        GPT2Config(vocab_size=50, n_embd=32, n_layer=2, n_head=4, n_positions=64, scale_attn_by_inverse_layer_idx=True,
                   attn_pdrop=0.0, bos_token_id=1, eos_token_id=None, pad_token_id=0)
    ),
}  # fmt: skip


def spread(model: Any) -> Any:
    """Weights that spread the logits: released initializations give nearly equal ones, in which nothing would show."""
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.normal_(0, parameter[0].numel() ** -0.5)
    return model.eval()


@pytest.fixture(scope="module", params=DECODERS)
def decoder(request: pytest.FixtureRequest) -> Any:
    torch.manual_seed(0)
    return spread(DECODERS[request.param]())


def prompts(padded: bool) -> dict[str, Tensor]:
    ids = torch.randint(3, 50, (2, 9), generator=torch.Generator().manual_seed(1))
    mask = torch.ones_like(ids)
    if padded:
        ids[1, :4], mask[1, :4] = 0, 0
    return {"input_ids": ids, "attention_mask": mask}


def under(model: Any, name: str, work: Callable[[], Any]) -> Any:
    before = model.config._attn_implementation
    model.set_attn_implementation(name)
    try:
        return work()
    finally:
        model.set_attn_implementation(before)


def greedy(model: Any, **options: Any) -> Tensor:
    out = model.generate(
        **prompts(True), max_new_tokens=4, do_sample=False, return_dict_in_generate=True, output_logits=True, **options
    )
    return torch.stack(out.logits)


@pytest.mark.parametrize("padded", [False, True])
def test_a_decoder_gives_the_logits_and_gradients_of_sdpa(decoder: Any, padded: bool) -> None:
    inputs = prompts(padded)

    def work() -> tuple[Tensor, list[Tensor]]:
        logits = decoder(**inputs).logits[inputs["attention_mask"].bool()]
        return logits.detach(), list(torch.autograd.grad(logits.square().mean(), list(decoder.parameters())))

    (plain, plain_gradients), (ours, gradients) = (under(decoder, n, work) for n in ("sdpa", transformers_attention()))
    assert float(plain.std()) > 0.3
    assert float((plain - ours).abs().max()) <= 1e-5
    assert all(
        float((a - b).abs().max()) <= 1e-5 * (1 + float(a.abs().max()))
        for a, b in zip(plain_gradients, gradients, strict=True)
    )


@pytest.mark.parametrize("options", [{}, {"cache_implementation": "static"}, {"num_beams": 2}], ids=str)
def test_a_decoder_generates_from_its_cache_as_over_sdpa(decoder: Any, options: dict[str, Any]) -> None:
    plain, ours = (under(decoder, n, lambda: greedy(decoder, **options)) for n in ("sdpa", transformers_attention()))
    assert float((plain - ours).abs().max()) <= 1e-5


def test_a_prompt_read_in_two_pieces_gives_the_logits_of_sdpa(decoder: Any) -> None:
    ids = prompts(False)["input_ids"]

    def work() -> Tensor:
        with torch.no_grad():
            first = decoder(ids[:, :5], use_cache=True)
            return decoder(ids[:, 5:], past_key_values=first.past_key_values).logits

    plain, ours = (under(decoder, n, work) for n in ("sdpa", transformers_attention()))
    assert float((plain - ours).abs().max()) <= 1e-5


def compiled_difference(model: Any, padded: bool) -> float:
    """Logits over SDPA against those of one compiled graph."""
    inputs = prompts(padded)
    shown = inputs["attention_mask"].bool()
    torch._dynamo.reset()
    with torch.no_grad():
        plain = under(model, "sdpa", lambda: model(**inputs).logits[shown])
        compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
        ours = under(model, transformers_attention(), lambda: compiled(**inputs, use_cache=False).logits[shown])
    return float((plain - ours).abs().max())


@pytest.mark.compile
def test_a_compiled_decoder_with_windows_and_padding_is_one_graph_with_the_logits_of_sdpa() -> None:
    torch.manual_seed(0)
    model = spread(MistralForCausalLM(MistralConfig(**{**SIZES, "num_hidden_layers": 1}, sliding_window=4)))
    assert compiled_difference(model, True) <= 1e-5


@pytest.mark.compile
@pytest.mark.slow
@pytest.mark.parametrize("padded", [False, True])
def test_every_compiled_decoder_is_one_graph_with_the_logits_of_sdpa(decoder: Any, padded: bool) -> None:
    assert compiled_difference(decoder, padded) <= 1e-5


def test_learned_sinks_take_their_share_as_in_the_eager_code() -> None:
    torch.manual_seed(0)
    model: Any = GptOssForCausalLM(GptOssConfig(**SIZES, **LAYERS, num_local_experts=2, num_experts_per_tok=1))
    spread(model)
    with torch.no_grad():
        for layer in model.model.layers:
            layer.self_attn.sinks.normal_(1.0)
    work = lambda: model(**prompts(True)).logits[prompts(True)["attention_mask"].bool()].detach()  # noqa: E731
    eager, ours = (under(model, n, work) for n in ("eager", transformers_attention()))
    assert float((eager - ours).abs().max()) <= 1e-5
    with torch.no_grad():
        for layer in model.model.layers:
            layer.self_attn.sinks.fill_(-100.0)
    assert float((under(model, transformers_attention(), work) - ours).abs().max()) > 0.01


def test_position_biases_and_encoders_are_as_over_sdpa() -> None:
    torch.manual_seed(0)
    t5 = spread(T5ForConditionalGeneration(T5Config(
        vocab_size=50, d_model=32, d_kv=8, d_ff=48, num_layers=2, num_heads=4, dropout_rate=0.0, pad_token_id=0,
        decoder_start_token_id=0)))  # fmt: skip
    bert = spread(BertModel(BertConfig(
        vocab_size=50, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=48,
        max_position_embeddings=32)))  # fmt: skip
    inputs = prompts(True)
    shown = inputs["attention_mask"].bool()
    answer = prompts(False)["input_ids"]
    for model, work in (
        (t5, lambda: t5(**inputs, labels=answer).logits.detach()),
        (bert, lambda: bert(**inputs).last_hidden_state[shown].detach()),
    ):
        plain, ours = (under(model, n, work) for n in ("sdpa", transformers_attention()))
        assert float((plain - ours).abs().max()) <= 1e-5


def test_additive_masks_of_a_user_and_the_reference_backend_are_as_over_sdpa() -> None:
    torch.manual_seed(0)
    model = spread(DECODERS["llama"]())
    ids = prompts(False)["input_ids"]
    mask = torch.zeros(2, 1, 9, 9).masked_fill(torch.ones(9, 9).triu(1).bool(), torch.finfo(torch.float32).min)
    mask[:, :, 6:, 2] = -1.5
    work = lambda: model(ids, attention_mask=mask).logits.detach()  # noqa: E731
    plain = under(model, "sdpa", work)
    assert float((plain - under(model, transformers_attention(), work)).abs().max()) <= 1e-5
    with use_backend("reference"):
        assert float((plain - under(model, transformers_attention(), work)).abs().max()) <= 1e-5


def test_what_would_change_the_scores_unseen_is_refused_by_name() -> None:
    torch.manual_seed(0)
    name = transformers_attention()
    gemma = Gemma2ForCausalLM(Gemma2Config(**SIZES, **LAYERS, attn_logit_softcapping=30.0)).eval()
    with pytest.raises(ValueError, match=r"^Gemma2Attention: attn_implementation='attn_core': scores cannot be soft-"
                       r"capped \(softcap\); use 'eager'$"):  # fmt: skip
        under(gemma, name, lambda: gemma(**prompts(False)))
    llama = LlamaForCausalLM(LlamaConfig(**SIZES, attention_dropout=0.1)).train()
    with pytest.raises(ValueError, match=r"^LlamaAttention: .*: attention weights are not dropped, got dropout=0\.1; "
                       "set the configuration's attention_dropout to 0$"):  # fmt: skip
        under(llama, name, lambda: llama(**prompts(False)))
    with pytest.raises(ValueError, match=r"there are no weights to return \(output_attentions=True\); use 'eager'"):
        under(llama.eval(), name, lambda: llama(**prompts(False), output_attentions=True))


def test_names_of_other_implementations_and_empty_ones_are_refused() -> None:
    for taken in ("sdpa", "eager", "flex_attention"):
        with pytest.raises(ValueError, match=f"^transformers_attention: name='{taken}' is another implementation's"):
            transformers_attention(taken)
    with pytest.raises(
        ValueError, match=r"^transformers_attention: name must be a word such as 'attn_core', got name=''"
    ):
        transformers_attention("")
    assert transformers_attention("attn_core_too") == "attn_core_too"


def test_without_transformers_the_way_out_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda _name: None)
    with pytest.raises(
        ImportError, match=r"^transformers_attention: transformers is not installed; pip install 'trans"
    ):
        transformers_attention()
