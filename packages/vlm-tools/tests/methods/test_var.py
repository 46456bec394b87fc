"""VAR: the published edit of dense maps, recovery of injected sinks, and every refusal."""

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from attn_core import visual_attention_redistribution
from vlm_tools import VAR, find_sinks, intervene, register_sinks
from vlm_tools.methods.sinks import known_sinks, normalized
from vlm_tools.testing.random_models import random_inputs, random_model


def edited_map(p: Tensor, visual: Tensor, sink: Tensor, rho: float, summ: float, keep: float) -> Tensor:
    """The paper's edit of a (H, N, N) map, entry by entry."""
    out = p.clone()
    last = int(visual.nonzero().max())
    vs, v = (visual & sink).nonzero().flatten().tolist(), (visual & ~sink).nonzero().flatten().tolist()
    ts = (~visual & sink).nonzero().flatten().tolist()
    for head in range(p.shape[0]):
        for row in range(last + 1, p.shape[1]):
            a = p[head, row]
            image = a[vs].sum() + a[v].sum()
            if not vs or a[vs].sum() / (image + 1e-6 * (len(vs) + len(v))) > rho or image < summ:
                continue
            budget = (1 - keep) * (a[vs].sum() + a[ts].sum())
            out[head, row, vs] = keep * a[vs]
            out[head, row, ts] = keep * a[ts]
            out[head, row, v] = a[v] + budget * a[v] / a[v].sum()
    return out


def test_edit_equals_the_dense_formulation() -> None:
    torch.manual_seed(0)
    q, k, v = (torch.randn(1, 3, 24, 8, dtype=torch.float64) for _ in range(3))
    visual = torch.zeros(24, dtype=torch.bool)
    visual[4:16] = True
    sink = torch.zeros(24, dtype=torch.bool)
    sink[[0, 5, 9]] = True
    p = (q @ k.transpose(-2, -1) * 8**-0.5).masked_fill(~torch.ones(24, 24).tril().bool(), -torch.inf).softmax(-1)
    want = edited_map(p[0], visual, sink, 0.5, 0.2, 0.6) @ v[0]
    rows = torch.arange(24)[None] > 15
    got, chosen = visual_attention_redistribution(
        q, k, v, visual[None], sink[None], rho=0.5, summ=0.2, p=0.6, query_mask=rows, causal="upper_left"
    )
    assert int(chosen.sum()) > 5
    torch.testing.assert_close(got[0], want, atol=1e-12, rtol=0)


@pytest.fixture(scope="module")
def sinky() -> tuple[Any, dict[str, Any], list[int]]:
    """A decoder of width 512 whose layer 1 writes 60 × RMS into dimension 7 at <bos> and two image tokens."""
    from transformers import CLIPVisionConfig, LlavaConfig, LlavaForConditionalGeneration

    torch.manual_seed(0)
    vision = CLIPVisionConfig(hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2,
                              image_size=28, patch_size=7)  # fmt: skip
    text = {"model_type": "llama", "vocab_size": 100, "hidden_size": 512, "intermediate_size": 32,
            "num_hidden_layers": 6, "num_attention_heads": 4, "num_key_value_heads": 2, "pad_token_id": 0,
            "bos_token_id": 1, "eos_token_id": 2}  # fmt: skip
    config = LlavaConfig(vision_config=vision, text_config=text, image_token_id=99, vision_feature_layer=-1)  # pyright: ignore[reportCallIssue]
    model = LlavaForConditionalGeneration(config).eval()
    inputs = random_inputs("test_llava", words=10)
    places = [0, 4, 11]  # <bos>, two image tokens (2 … 17)

    def inject(_module: Any, _args: Any, output: Any) -> Any:
        hidden = output[0] if isinstance(output, tuple) else output
        hidden = hidden.clone()
        hidden[:, places, 7] = 60 * hidden[:, places].square().mean(-1).sqrt()
        return (hidden, *output[1:]) if isinstance(output, tuple) else hidden

    model.get_decoder().get_submodule("layers.1").register_forward_hook(inject)
    return model, inputs, places


def test_injected_sink_dimension_and_tokens_are_recovered_exactly(sinky: tuple[Any, dict[str, Any], list[int]]) -> None:
    model, inputs, places = sinky
    found = find_sinks(model, inputs)
    assert found.dims == (7,)
    with torch.no_grad(), intervene(model, VAR(dims=found.dims, summ=0.0)) as run:
        model(**inputs)
        sinks = {layer: run._state[layer]["sinks"][0].nonzero().flatten().tolist() for layer in (2, 3)}
    assert sinks == dict.fromkeys((2, 3), places)
    assert sum(row["edited"] for row in run.report()) > 0


def test_text_before_the_image_and_keep_one_are_untouched(sinky: tuple[Any, dict[str, Any], list[int]]) -> None:
    model, inputs, _ = sinky
    with torch.no_grad():
        plain = model(**inputs).logits
        with intervene(model, VAR(dims=(7,), summ=0.0)):
            changed = model(**inputs).logits
        with intervene(model, VAR(dims=(7,), summ=0.0, keep=1.0)):
            kept = model(**inputs).logits
    # Two kernels compute these rows, so their last bits depend on the processor.
    torch.testing.assert_close(plain[:, :18], changed[:, :18], atol=1e-5, rtol=0)
    assert float((plain[:, 18:] - changed[:, 18:]).abs().max()) > 1e-3
    torch.testing.assert_close(plain, kept, atol=1e-6, rtol=0)


def test_options_change_what_is_edited(sinky: tuple[Any, dict[str, Any], list[int]]) -> None:
    model, inputs, _ = sinky

    def edited(**options: Any) -> list[float]:
        with torch.no_grad(), intervene(model, VAR(dims=(7,), **options)) as run:
            model(**inputs)
        return [row["edited"] for row in run.report()]

    assert len(edited(skip_last_layer=True)) == len(edited()) - 1
    assert sum(edited(summ=0.9)) < sum(edited(summ=0.0))
    assert sum(edited(summ=0.0, min_nonsink_ratio=0.99)) < sum(edited(summ=0.0, min_nonsink_ratio=0.1))
    assert len(edited(layers=[3])) == 1


def test_refusals_name_the_way_out(sinky: tuple[Any, dict[str, Any], list[int]]) -> None:
    model, _, _ = sinky
    unknown = pytest.raises(ValueError, match=r"6 layers are unknown; find them with vlm_tools\.find_sinks")
    with unknown, intervene(model, VAR()):
        pass
    register_sinks("llama", 512, 6, [7], source="test")
    known = known_sinks(model.get_decoder().config)
    assert known is not None
    assert known.dims == (7,)
    with intervene(model, VAR()):
        pass
    with pytest.raises(ValueError, match="dims must name dimensions 0 … 511"):
        register_sinks("llama", 512, 6, [600], source="test")
    narrow = random_model("test_llava")
    unreachable = pytest.raises(ValueError, match=r"VAR: no sink dimensions found.*tau=20 is out of reach")
    with unreachable, intervene(narrow, VAR(dims=(1,))):
        pass
    with pytest.raises(ValueError, match="none exceeds 5 × RMS"):
        find_sinks(narrow, random_inputs("test_llava"), tau=5.0)
    with pytest.raises(ValueError, match=r"VAR: keep must lie in \[0, 1\], got keep=2"):
        VAR(keep=2)
    assert float(normalized(torch.ones(1, 1, 4)).max()) == pytest.approx(1, abs=1e-5)


def test_logits_equal_those_of_edited_dense_maps(setting: Any, check_dense: Callable[..., None]) -> None:
    dims, tau, ratio, summ, keep = [3, 5], 1.5, 0.3, 0.1, 0.6
    found: dict[int, Tensor] = {}

    def edit(scores: Tensor, layer: int, hidden: Tensor) -> Tensor:
        p = scores.softmax(-1)
        if layer < 2:
            return p
        rows, keys = p.shape[2:]
        if rows == keys:
            size = hidden[0].abs() / hidden[0].square().mean(-1, keepdim=True).sqrt()
            found[layer] = size[:, dims].amax(-1) > tau
        visual = setting.visual_of(keys)
        sink = torch.nn.functional.pad(found[layer], (0, keys - len(found[layer])))
        last = int(visual.nonzero().max())
        out = p.clone()
        for row in range(rows):
            if keys - rows + row <= last:
                continue
            for head in range(p.shape[1]):
                a = p[0, head, row]
                of_sinks, of_rest = a[visual & sink].sum(), a[visual & ~sink].sum()
                image = of_sinks + of_rest
                if image < summ or of_sinks / image > 1 - ratio:
                    continue
                given = (1 - keep) * a[sink].sum()
                out[0, head, row, sink] = keep * a[sink]
                out[0, head, row, visual & ~sink] = a[visual & ~sink] * (1 + given / of_rest)
        return out

    check_dense(VAR(dims=dims, tau=tau, min_nonsink_ratio=ratio, summ=summ, keep=keep), edit)
    assert all(0 < int(sinks.sum()) < len(sinks) for sinks in found.values())


def test_a_prompt_in_two_pieces_has_the_logits_of_the_whole(setting: Any) -> None:
    ids, cut = setting.inputs["input_ids"], int(setting.visual.nonzero().max()) + 3
    method = VAR(dims=[3, 5], tau=1.5, min_nonsink_ratio=0.3, summ=0.1)
    with torch.no_grad(), intervene(setting.model, method):
        whole = setting.model(**setting.inputs).logits[:, cut:]
        first = setting.model(input_ids=ids[:, :cut], pixel_values=setting.inputs["pixel_values"], use_cache=True)
        rest = setting.model(input_ids=ids[:, cut:], past_key_values=first.past_key_values)
    with torch.no_grad():
        plain = setting.model(**setting.inputs).logits[:, cut:]
    assert float((whole - plain).abs().max()) > 1e-3
    torch.testing.assert_close(rest.logits, whole, atol=1e-8, rtol=0)


def test_layers_are_all_but_the_first_two_and_on_request_the_last() -> None:
    assert list(VAR().default_layers(5)) == [2, 3, 4]
    assert list(VAR(skip_last_layer=True).default_layers(5)) == [2, 3]


def test_a_dimension_must_stand_out_in_most_layers_of_the_middle(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of twelve layers six are in the middle: four of them are most, three are not; the others do not count."""
    states = [torch.ones(1, 4, 600) for _ in range(12)]
    for layer in (3, 4, 5, 6):
        states[layer][0, 2, 2] = 300
    for layer in (0, 1, 2, 6, 7, 8, 9, 10, 11):
        states[layer][0, 1, 5] = 300
    monkeypatch.setattr("vlm_tools.methods.sinks._entering", lambda *_: states)
    config = SimpleNamespace(hidden_size=600, num_hidden_layers=12)
    model = SimpleNamespace(get_decoder=lambda: SimpleNamespace(config=config))
    assert find_sinks(model, {}).dims == (2,)
