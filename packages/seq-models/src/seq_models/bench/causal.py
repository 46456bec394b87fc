"""Speed of the causal models: training steps beside the peer's in one run, and decoding after short and long texts."""

import warnings
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from attn_core.engine import BenchmarkRequest
from seq_models.bench.s2 import benchmark_s2
from seq_models.bench.timing import medians, training_step
from seq_models.bench.titans import benchmark_titans
from seq_models.models import create_model

REPEATS = 3
LENGTH = 8192
# The published enwik8 model (8,192 tokens, 16 clusters of 512, blocks of 256), with heads of 32 channels and 2 layers.
PUBLISHED: dict[str, Any] = {
    "hidden_size": 256,
    "num_hidden_layers": 2,
    "num_attention_heads": 8,
    "num_local_heads": 4,
    "window": 512,
    "local_block": 256,
}
SHORT, LONG = 256, 16384
DECODED = 100


def benchmark_causal(request: BenchmarkRequest) -> Iterator[Mapping[str, object]]:
    """Rows ``{"model", "quantity", "value", "beside", "ratio"}``; times in milliseconds, medians of runs in turns.

    ``beside`` is the training step of the peer (Routing Transformer, if ``routing_transformer`` is installed; Titans,
    if ``titans_pytorch`` is), the memory of Titans token by token, or the same model after 256 tokens (decoding after
    16,384 tokens). A name of Titans gives the rows of its memory, which are of one size.
    """
    batch = request.batch_size or 1
    for name in request.models or ("routing_bytes", "s2_bytes", "titans_lmm_340m", "transnormer_bytes"):
        torch.manual_seed(0)
        ids = torch.randint(0, 256, (batch, LENGTH), device=request.device)
        if name.startswith(("routing", "test_routing")):
            yield from _training(name, ids)
        elif name.startswith(("titans", "test_titans")):
            yield from benchmark_titans(batch, request.device)
        elif name.startswith(("s2", "test_s2")):
            yield from benchmark_s2(name, ids)
        else:
            yield from _decoding(name, ids[:1])


def _training(name: str, ids: Tensor) -> Iterator[Mapping[str, object]]:
    """The peer's model of the same size, and ours with the peer's rule and with the causal selection."""
    rule: Any = {"style": "lucidrains", "selection": "topk"}
    ours = {"topk, as the peer": rule, "causal": {"style": "lucidrains", "selection": "causal"}}
    steps: dict[str, Callable[[], object]] = {}
    sizes = PUBLISHED if name == "routing_bytes" else {}
    config: Any = create_model(name, **sizes).config  # pyright: ignore[reportAttributeAccessIssue]
    for label, options in ours.items():
        model: Any = create_model(name, **{**sizes, "num_clusters": LENGTH // config.window, **options})
        model = model.to(ids.device).train()
        steps[label] = training_step(model, lambda model=model: model(ids, labels=ids).loss)
    peer = _peer(config)
    if peer is not None:
        peer = peer.to(ids.device).train()

        def loss() -> Tensor:
            logits, commitment = peer(ids)
            return torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten()) + commitment

        steps["peer"] = training_step(peer, loss)
    times = medians(steps, REPEATS)
    for label in ours:
        beside = times.get("peer")
        yield {
            "model": f"{name} ({label})",
            "quantity": "training step, ms",
            "value": f"{times[label]:.0f}",
            "beside": "–" if beside is None else f"{beside:.0f}",
            "ratio": "–" if beside is None else f"{times[label] / beside:.2f}",
        }


def _peer(config: Any) -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            from routing_transformer import RoutingTransformerLM  # pyright: ignore[reportMissingImports]
        except ImportError:
            return None
        return RoutingTransformerLM(
            num_tokens=config.vocab_size, dim=config.hidden_size, depth=config.num_hidden_layers, max_seq_len=LENGTH,
            heads=config.num_attention_heads, dim_head=config.head_dim, window_size=config.window, causal=True,
            local_attn_window_size=config.local_block, n_local_attn_heads=config.num_local_heads, shared_qk=True,
        )  # fmt: skip


@torch.inference_mode()
def _decoding(name: str, ids: Tensor) -> Iterator[Mapping[str, object]]:
    model: Any = create_model(name).to(ids.device).eval()
    states, bytes_, token = {}, {}, ids[:, :1]
    for length in (SHORT, LONG):
        prompt = torch.randint(0, 255, (1, length), device=ids.device)
        states[length] = model(prompt, use_cache=True, logits_to_keep=1).past_key_values
        bytes_[length] = states[length].nbytes()
    steps = {
        str(length): lambda state=state: model(token, past_key_values=state, use_cache=True)
        for length, state in states.items()
    }
    times = medians(steps, DECODED)
    for quantity, after, before in (
        (f"one token after {LONG} (beside: {SHORT}), ms", times[str(LONG)], times[str(SHORT)]),
        (f"state after {LONG} (beside: {SHORT}), bytes", float(bytes_[LONG]), float(bytes_[SHORT])),
    ):
        shown = (f"{after:.2f}", f"{before:.2f}") if quantity.endswith("ms") else (f"{after:.0f}", f"{before:.0f}")
        yield {
            "model": name,
            "quantity": quantity,
            "value": shown[0],
            "beside": shown[1],
            "ratio": f"{after / before:.2f}",
        }
