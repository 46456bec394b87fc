"""The memory of titans-pytorch, against the installed original."""

from typing import Any

import pytest
import torch

from seq_models.layers.titans_lucidrains import LucidrainsMemory

CASES: list[dict[str, Any]] = [
    {},
    {"chunk_size": 4},
    {"chunk_size": 4, "batch_size": 4},
    {"chunk_size": 2, "batch_size": 8},
    {"chunk_size": 4, "depth": 1},
    {"chunk_size": 3, "depth": 3, "expansion": 2.0},
    {"chunk_size": 4, "momentum": False},
    {"chunk_size": 4, "heads": 2, "head_dim": 6},
    {"chunk_size": 4, "heads": 2, "head_dim": 6, "qk_norm": True, "batch_size": 8, "max_step": 0.1},
]


@pytest.mark.parity
@pytest.mark.parametrize("options", CASES, ids=str)
def test_outputs_and_gradients_equal_titans_pytorch(options: dict[str, Any]) -> None:
    import warnings

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        titans = pytest.importorskip("titans_pytorch")
    torch.manual_seed(0)
    names = {"head_dim": "dim_head", "qk_norm": "qk_rmsnorm", "max_step": "default_step_transform_max_lr"}
    known = {names.get(key, key): value for key, value in options.items() if key not in ("depth", "expansion")}
    model = {"depth": options.get("depth", 2), "expansion_factor": options.get("expansion", 4.0)}
    theirs = titans.NeuralMemory(dim=8, default_model_kwargs=model, **known).double()
    ours = LucidrainsMemory(8, **options).double()
    ours.load_peer(theirs.state_dict())
    x = torch.randn(2, 19, 8, dtype=torch.float64, requires_grad=True)
    target = torch.randn(2, 19, 8, dtype=torch.float64)
    y, expected = ours(x), theirs(x)[0]
    assert (y - expected).abs().max() < 1e-10
    (gradient,) = torch.autograd.grad((y * target).sum(), x, retain_graph=True)
    (reference,) = torch.autograd.grad((expected * target).sum(), x)
    assert (gradient - reference).abs().max() < 1e-10
    (y * target).sum().backward()
    assert [name for name, p in ours.named_parameters() if p.grad is None] == []


def test_heads_are_parameters_that_an_optimizer_can_update() -> None:
    memory = LucidrainsMemory(8, heads=2, head_dim=4, chunk_size=2)
    before = memory.weights[0].detach().clone()
    memory(torch.randn(1, 9, 8)).sum().backward()
    torch.optim.SGD(memory.parameters(), lr=0.1).step()
    assert not torch.equal(before, memory.weights[0])


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"chunk_size": 0}, "chunk_size must be at least 1"),
        ({"head_dim": 4}, "one head is as wide as dim=8, got head_dim=4"),
        ({"chunk_size": 4, "batch_size": 6}, "batch_size must be a multiple of chunk_size=4, got 6"),
    ],
)
def test_sizes_that_do_not_fit_are_named(options: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        LucidrainsMemory(8, **options)


def test_unusable_input_and_keys_are_named() -> None:
    memory = LucidrainsMemory(8)
    with pytest.raises(ValueError, match=r"x must be \(B, N, 8\) with N ≥ 1, got \(1, 0, 8\)"):
        memory(torch.zeros(1, 0, 8))
    with pytest.raises(ValueError, match=r"missing keys .*to_keys.weight"):
        memory.load_peer({})
