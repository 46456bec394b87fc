"""Speed and memory of S2-Attention beside the same Llama with torch's attention, and with a cache of all keys."""

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor
from transformers import LlamaForCausalLM
from transformers.cache_utils import DynamicCache

from seq_models.bench.timing import medians, training_step
from seq_models.layers.s2_attention import S2Cache
from seq_models.models import create_model

REPEATS = 3
DECODED = 30
# One layer, most of whose time is attention; columns of eight heads cover every block.
SIZES: dict[str, Any] = {
    "hidden_size": 256,
    "intermediate_size": 704,
    "num_hidden_layers": 1,
    "num_attention_heads": 8,
    "num_key_value_heads": 8,
    "block_size": 64,
    "vert_stride": 8,
}
LOCAL = (2, 16)  # blocks of the band; 16 are Phi-3-small's


def benchmark_s2(name: str, ids: Tensor) -> Iterator[Mapping[str, object]]:
    """Rows as of `seq_models.bench.causal.benchmark_causal`; beside is dense attention."""
    sizes = SIZES if name == "s2_bytes" else {}
    models: dict[str, Any] = {f"{name}, {local} local blocks": {**sizes, "local_blocks": local} for local in LOCAL}
    models = {label: create_model(name, **options).to(ids.device) for label, options in models.items()}
    dense: Any = LlamaForCausalLM(next(iter(models.values())).config).to(ids.device)  # pyright: ignore[reportArgumentType]
    dense.set_attn_implementation("sdpa")
    steps = {
        label: training_step(model.train(), lambda model=model: model(ids, labels=ids, use_cache=False).loss)
        for label, model in {**models, "dense": dense}.items()
    }
    times = medians(steps, REPEATS)
    for label in models:
        yield _row(label, "training step, ms", times[label], times["dense"])
    for label, model in models.items():
        yield from _decoding(label, model.eval(), ids)


@torch.inference_mode()
def _decoding(label: str, model: Any, ids: Tensor) -> Iterator[Mapping[str, object]]:
    states: dict[str, Any] = {"ours": None, "beside": DynamicCache()}
    for kind, state in states.items():
        out = model(ids, past_key_values=state, use_cache=True, logits_to_keep=1)
        states[kind] = out.past_key_values
    ours, full = states["ours"], states["beside"]
    assert isinstance(ours, S2Cache)
    held = sum(layer.keys.nbytes + layer.values.nbytes for layer in full.layers)
    yield _row(label, f"cache after {ids.shape[1]} tokens, bytes", ours.nbytes(), held)
    steps = {
        kind: lambda state=state: model(ids[:, :1], past_key_values=state, use_cache=True)
        for kind, state in states.items()
    }
    times = medians(steps, DECODED)
    yield _row(label, "one token more, ms", times["ours"], times["beside"])


def _row(model: str, quantity: str, value: float, beside: float) -> Mapping[str, object]:
    return {
        "model": f"{model} (beside: dense)" if quantity.startswith("training") else f"{model} (beside: all keys)",
        "quantity": quantity,
        "value": f"{value:.1f}" if quantity.startswith("one") else f"{value:.0f}",
        "beside": f"{beside:.1f}" if quantity.startswith("one") else f"{beside:.0f}",
        "ratio": f"{value / beside:.2f}",
    }
