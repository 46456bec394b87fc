"""Prefill time and memory of each method against plain SDPA and against eager maps, in one run.

The prompt is the hardest one for VAR: the image stands near its start, so that nearly all rows are behind it (``--after
64``: a short question behind a long text and the image); and all four layers are changed, where the published methods
leave the first two alone. The decoder is narrow (512), so that
attention is a third of the work; in a released decoder it is less and the ratios come closer to 1.

``vlm-tools benchmark --json FILE`` writes the rows with the environment they were measured in.
"""

import platform
from collections.abc import Callable, Sequence
from datetime import date
from typing import Any

import torch
from transformers import CLIPVisionConfig, LlavaConfig, LlavaForConditionalGeneration

from attn_core.bench import in_turns
from attn_core.engine import BenchmarkRequest
from attn_core.testing import peak_memory
from vlm_tools.intervention.hooking import intervene
from vlm_tools.intervention.method import Method
from vlm_tools.methods.act import ACT
from vlm_tools.methods.logit_boost import LogitBoost
from vlm_tools.methods.pai import PAI
from vlm_tools.methods.var import VAR

IMAGE, WIDTH, HEADS, LAYERS = 99, 512, 8, 4
SYSTEM = 35  # tokens in front of the image, as in LLaVA 1.5
ALL = range(LAYERS)
METHODS: dict[str, Callable[[], Method]] = {
    "var": lambda: VAR(dims=(0, 1), tau=3.0, layers=ALL),
    # two of eight heads; the published list for Llama-2-7B holds 184 of 1,024
    "act": lambda: ACT(heads={layer: [0, 1] for layer in ALL}),
    "act_all_heads": lambda: ACT(layers=ALL),
    "pai": lambda: PAI(gamma=1.0, layers=ALL),
    "logit_boost": lambda: LogitBoost(1.0, layers=ALL),
}


def benchmark(
    request: BenchmarkRequest,
    *,
    tokens: int = 4096,
    after: int | None = None,
    repeats: int = 3,
) -> list[dict[str, Any]]:
    """One row per method: seconds, ratios to SDPA and to eager maps, peak memory with all and with half of the tokens.

    ``growth`` is the quotient of the two: 2 where memory is linear in the length, towards 4 where maps are held.

    Args:
        tokens: length of the prompt.
        after: tokens behind the image; None: all but 35.
        repeats: calls in turns; medians are reported.

    Raises:
        ValueError: unknown method.
    """
    unknown = [name for name in request.models if name not in METHODS]
    if unknown:
        raise ValueError(f"benchmark: unknown method {unknown[0]!r}; there are {', '.join(METHODS)}")
    names = list(request.models or METHODS)
    calls, half = (_calls(names, length, after, request.device) for length in (tokens, tokens // 2))
    found = in_turns(calls, device=request.device, rounds=repeats)
    median = {name: one.ms / 1e3 for name, one in found.items()}
    where = {"tokens": tokens, "after": after, "torch": torch.__version__, "device": platform.processor() or "CPU",
             "threads": torch.get_num_threads(), "date": date.today().isoformat()}  # fmt: skip
    rows = []
    for name, call in calls.items():
        peak, least = peak_memory(call), peak_memory(half[name])
        rows.append(
            {
                "method": name,
                "seconds": round(median[name], 3),
                "over_sdpa": round(median[name] / median["sdpa"], 3),
                "over_eager": round(median[name] / median["eager maps"], 3),
                "peak_mib": round(peak / 2**20, 1),
                "growth": round(peak / least, 2),
                **where,
            }
        )
    return rows


def _calls(names: Sequence[str], tokens: int, after: int | None, device: torch.device) -> dict[str, Callable[[], None]]:
    """A prefill under plain SDPA, under each method, and with eager maps."""
    model, inputs = long_prompt(tokens, after)
    model = model.to(device)  # pyright: ignore[reportArgumentType]
    inputs = {name: value.to(device) for name, value in inputs.items()}
    return {
        "sdpa": lambda: _prefill(model, inputs, None, "sdpa"),
        **{name: (lambda name=name: _prefill(model, inputs, METHODS[name](), "sdpa")) for name in names},
        "eager maps": lambda: _prefill(model, inputs, None, "eager"),
    }


def long_prompt(tokens: int, after: int | None = None) -> tuple[LlavaForConditionalGeneration, dict[str, torch.Tensor]]:
    """A random LLaVA of four layers, and a prompt of ``tokens`` tokens, 576 of them the image's."""
    torch.manual_seed(0)
    vision = CLIPVisionConfig(
        hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4, image_size=336, patch_size=14
    )
    text = {
        "model_type": "llama", "vocab_size": 100, "hidden_size": WIDTH, "intermediate_size": 4 * WIDTH,
        "num_hidden_layers": LAYERS, "num_attention_heads": HEADS, "num_key_value_heads": HEADS,
        "max_position_embeddings": 2 * tokens, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
    }  # fmt: skip
    config = LlavaConfig(vision_config=vision, text_config=text, image_token_id=IMAGE, vision_feature_layer=-1)  # pyright: ignore[reportCallIssue]
    model = LlavaForConditionalGeneration(config).eval()
    words = torch.randint(3, 90, (tokens - 576,))
    before = SYSTEM if after is None else len(words) - after
    if before < 1:
        raise ValueError(
            f"benchmark: a prompt of {tokens} tokens, 576 of them the image's, cannot have {after} behind it"
        )
    ids = torch.cat([words[:before], torch.full((576,), IMAGE), words[before:]])[None]
    return model, {
        "input_ids": ids,
        "attention_mask": torch.ones_like(ids),
        "pixel_values": torch.randn(1, 3, 336, 336),
    }


def _prefill(model: Any, inputs: dict[str, torch.Tensor], method: Method | None, implementation: str) -> None:
    model.set_attn_implementation(implementation)
    try:
        with torch.no_grad():
            if method is None:
                maps = implementation == "eager"
                model(**inputs, use_cache=False, output_attentions=maps, logits_to_keep=1)
            else:
                with intervene(model, method):
                    model(**inputs, use_cache=False, logits_to_keep=1)
    finally:
        model.set_attn_implementation("sdpa")
