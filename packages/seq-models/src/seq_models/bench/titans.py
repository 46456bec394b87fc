"""Speed of Titans' memory: chunks against the token-by-token rule, and a training step beside titans-pytorch's."""

import warnings
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from seq_models.bench.timing import medians, training_step
from seq_models.layers.neural_memory import chunked_memory, fresh_memory, sequential_memory
from seq_models.layers.titans_lucidrains import LucidrainsMemory

REPEATS = 3
TOKENS, HEADS, WIDTH, CHUNK = 512, 4, 64, 16  # one layer's memory
PEER_TOKENS, PEER_WIDTH, PEER_CHUNK = 1024, 128, 32


def benchmark_titans(batch: int, device: torch.device) -> Iterator[Mapping[str, object]]:
    """Rows as of `seq_models.bench.causal.benchmark_causal`."""
    torch.manual_seed(0)
    yield _row("titans memory (beside: token by token)", medians(_rules(batch, device), REPEATS))
    steps = _against_peer(batch, device)
    if steps is not None:
        yield _row("titans_lucidrains memory (beside: titans-pytorch)", medians(steps, REPEATS))


def _row(model: str, times: Mapping[str, float]) -> Mapping[str, object]:
    ours, beside = times["ours"], times["beside"]
    return {
        "model": model,
        "quantity": "training step, ms",
        "value": f"{ours:.0f}",
        "beside": f"{beside:.0f}",
        "ratio": f"{ours / beside:.2f}",
    }


def _rules(batch: int, device: torch.device) -> dict[str, Callable[[], object]]:
    """Forward and backward pass of a memory of two layers by both rules."""
    weights = [torch.randn(batch, HEADS, *s, device=device) / 8 for s in ((WIDTH, 2 * WIDTH), (2 * WIDTH, WIDTH))]
    streams = [torch.randn(batch, HEADS, TOKENS, WIDTH, device=device) / 8 for _ in range(3)]
    gates = [scale * torch.rand(batch, HEADS, TOKENS, device=device) for scale in (0.05, 0.05, 0.9)]
    leaves = [x.requires_grad_() for x in (*weights, *streams, *gates)]

    def step(rule: Callable[..., tuple[Tensor, Any]]) -> None:
        y, _ = rule(fresh_memory((leaves[0], leaves[1])), *leaves[2:], chunk=CHUNK)
        torch.autograd.grad(y.sum(), leaves)

    return {"ours": lambda: step(chunked_memory), "beside": lambda: step(sequential_memory)}


def _against_peer(batch: int, device: torch.device) -> dict[str, Callable[[], object]] | None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            from titans_pytorch import MemoryMLP, NeuralMemory  # pyright: ignore[reportMissingImports]
        except ImportError:
            return None
        # The gradient point of the paper; one head, as no optimizer on a CPU can update the peer's several.
        model = MemoryMLP(PEER_WIDTH, depth=2, expansion_factor=4.0)
        theirs: Any = NeuralMemory(dim=PEER_WIDTH, chunk_size=PEER_CHUNK, batch_size=PEER_CHUNK, model=model)
    ours = LucidrainsMemory(PEER_WIDTH, chunk_size=PEER_CHUNK, batch_size=PEER_CHUNK)
    ours.load_peer(theirs.state_dict())
    x = torch.randn(batch, PEER_TOKENS, PEER_WIDTH, device=device)
    theirs, ours = theirs.to(device), ours.to(device)
    return {
        "ours": training_step(ours, lambda: ours(x).square().mean()),
        "beside": training_step(theirs, lambda: theirs(x)[0].square().mean()),
    }
