"""selective_scan: numbers by hand, its properties, parity, and every message."""

import importlib
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from attn_core import linear_scan, selective_scan
from attn_core.ops.selective_scan import triton_obstacle
from attn_core.testing import Case, cases_of, leaves, relative_error, run


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def operands(steps: int, batch: int = 1, channels: int = 4, width: int = 3, groups: int = 2) -> list[Tensor]:
    maps = [random(batch, groups, width, steps, seed=seed) for seed in (3, 4)]
    delta = random(batch, channels, steps, seed=1).abs()
    return [random(batch, channels, steps), delta, -random(channels, width, seed=2).abs(), *maps]


def test_two_steps_by_hand() -> None:
    one = torch.ones(1, 1, 1, 2, dtype=torch.float64)
    u = torch.tensor([[[2.0, 3.0]]], dtype=torch.float64)
    out, state = selective_scan(u, 0.5 * torch.ones_like(u), torch.tensor([[-1.0]]).double(), one, 4 * one)
    first = 0.5 * 2
    second = math.exp(-0.5) * first + 0.5 * 3
    torch.testing.assert_close(out, torch.tensor([[[4 * first, 4 * second]]]).double())
    torch.testing.assert_close(state, torch.tensor([[[second]]]).double())


@settings(deadline=None, max_examples=20)
@given(steps=st.integers(1, 150), reverse=st.booleans())
@pytest.mark.parametrize("backend", ["reference", "torch"])
def test_equals_a_linear_scan_over_all_states(backend: str, steps: int, reverse: bool) -> None:
    u, delta, A, B, C = operands(steps)
    gates = torch.exp(torch.einsum("bct,cn->btcn", delta, A))
    terms = torch.einsum("bct,bcnt->btcn", delta * u, B.repeat_interleave(2, dim=1))
    h = linear_scan(gates, terms, reverse=reverse)
    expected = torch.einsum("btcn,bcnt->bct", h, C.repeat_interleave(2, dim=1))
    out, state = selective_scan(u, delta, A, B, C, reverse=reverse, backend=backend)  # pyright: ignore[reportArgumentType]
    assert relative_error(out, expected) <= 1e-10
    assert relative_error(state, h[:, 0 if reverse else -1]) <= 1e-10


@settings(deadline=None, max_examples=15)
@given(steps=st.integers(1, 140))
def test_reverse_is_the_scan_of_the_mirrored_sequence(steps: int) -> None:
    u, delta, A, B, C = operands(steps)
    mirrored, last = selective_scan(u.flip(-1), delta.flip(-1), A, B.flip(-1), C.flip(-1))
    out, state = selective_scan(u, delta, A, B, C, reverse=True)
    assert relative_error(out, mirrored.flip(-1)) <= 1e-10
    assert relative_error(state, last) <= 1e-10


@settings(deadline=None, max_examples=15)
@given(parts=st.lists(st.integers(1, 90), min_size=1, max_size=3))
def test_pieces_joined_by_their_state_equal_the_whole(parts: list[int]) -> None:
    u, delta, A, B, C = operands(sum(parts))
    outs, state = [], None
    for piece in zip(*(x.split(parts, -1) for x in (u, delta, B, C)), strict=True):
        out, state = selective_scan(piece[0], piece[1], A, piece[2], piece[3], initial_state=state)
        outs.append(out)
    assert relative_error(torch.cat(outs, -1), selective_scan(u, delta, A, B, C)[0]) <= 1e-10


@settings(deadline=None, max_examples=15)
@given(steps=st.integers(2, 140), cut=st.integers(0, 138))
def test_the_future_has_no_influence(steps: int, cut: int) -> None:
    cut = min(cut, steps - 2)
    u, delta, A, B, C = operands(steps)
    changed = [x.clone() for x in (u, delta, B, C)]
    for x in changed:
        x[..., cut + 1 :] += 2
    expected = selective_scan(u, delta, A, B, C)[0][..., : cut + 1]
    actual = selective_scan(changed[0], changed[1], A, changed[2], changed[3])[0][..., : cut + 1]
    assert relative_error(actual, expected) <= 1e-12


def test_a_batch_walked_in_spans_equals_its_images_one_by_one(monkeypatch: pytest.MonkeyPatch) -> None:
    backend = importlib.import_module("attn_core.ops.selective_scan.torch_backend")
    u, delta, A, B, C = operands(70, batch=5)
    expected = selective_scan(u, delta, A, B, C)
    monkeypatch.setattr(backend, "CHUNK_NUMBERS", 2 * backend.CHUNK * A.numel())
    assert len(backend.spans(5, *A.shape)) == 3
    for actual, want in zip(selective_scan(u, delta, A, B, C), expected, strict=True):
        assert relative_error(actual, want) <= 1e-12


@pytest.mark.parity
def test_equals_mambas_reference() -> None:
    interface = pytest.importorskip("mamba_ssm.ops.selective_scan_interface")
    u, delta, A, B, C = (x.float() for x in operands(90))
    z, bias = random(1, 4, 90, seed=5).float(), random(4, seed=6).float()
    expected, final = interface.selective_scan_ref(u, delta, A, B, C, bias, z, bias, True, True)
    out, state = selective_scan(u, delta, A, B, C, bias, z, bias, delta_softplus=True)
    assert relative_error(out, expected) <= 2e-5
    assert relative_error(state, final) <= 2e-5


@pytest.mark.parametrize("constant", ["B", "C", "BC"])
def test_constant_maps_equal_maps_repeated_at_every_step(constant: str) -> None:
    u, delta, A, *_ = operands(70, batch=2)
    given = {name: random(4, 3, seed=7 + i) for i, name in enumerate("BC")}
    repeated = {name: x[None, :, :, None].expand(2, -1, -1, 70) for name, x in given.items()}
    expected = selective_scan(u, delta, A, *repeated.values())
    mixed = [given[name] if name in constant else repeated[name] for name in "BC"]
    for actual, want in zip(selective_scan(u, delta, A, *mixed), expected, strict=True):
        assert relative_error(actual, want) <= 1e-12


PAIRS = [case for case in cases_of("selective_scan") if "pairs" in case.name and "chunks" not in case.name]


@pytest.mark.parametrize("case", PAIRS, ids=str)
def test_complex_gradients_and_second_derivatives_are_those_of_finite_differences(case: Case) -> None:
    args, kwargs = case.inputs(torch.float64)

    def function(*_: Tensor) -> tuple[Tensor, ...]:  # gradcheck perturbs the leaves in place
        return run(case, args, kwargs, "torch")

    assert torch.autograd.gradcheck(function, leaves(args, kwargs), fast_mode=True)
    assert torch.autograd.gradgradcheck(function, leaves(args, kwargs), fast_mode=True)


@pytest.mark.parametrize("backend", ["reference", "torch"])
def test_a_conjugate_pair_equals_a_real_oscillator(backend: str) -> None:
    steps, rate, angle = 9, 0.3, 0.7
    u, one = random(1, 1, steps), torch.ones(1, 1, dtype=torch.complex128)
    A = torch.tensor([[complex(-rate, angle)]], dtype=torch.complex128)
    out, _ = selective_scan(u, torch.ones_like(u), A, one, one, backend=backend)  # pyright: ignore[reportArgumentType]
    weights = [2 * math.exp(-rate * t) * math.cos(angle * t) for t in range(steps)]
    expected = [sum(weights[t - s] * float(u[0, 0, s]) for s in range(t + 1)) for t in range(steps)]
    assert relative_error(out[0, 0], torch.tensor(expected, dtype=torch.float64)) <= 1e-12


def test_the_kernel_refuses_complex_numbers_by_name() -> None:
    A = torch.zeros(4, 3, dtype=torch.complex64)
    assert triton_obstacle(A=A) == "the kernel is real, got A.dtype=torch.complex64; backend='torch' computes it"


def make(**replaced: object) -> dict[str, object]:
    names = ("u", "delta", "A", "B", "C")
    return {**{name: x.float() for name, x in zip(names, operands(6, batch=2), strict=True)}, **replaced}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"u": torch.zeros(4, 6)}, r"selective_scan: u must have 3 dimensions \(B C T\), got shape \(4, 6\)"),
        ({"u": torch.zeros(2, 4, 6).long()}, "selective_scan: u must be one of float64"),
        ({"delta": torch.zeros(2, 3, 6)}, r"delta must have size 4 along dimension 1 \(the channels of u\)"),
        ({"delta": torch.zeros(2, 4, 6).half()}, "delta must be one of float32, got delta.dtype=torch.float16"),
        ({"A": torch.zeros(3, 3)}, r"A must have size 4 along dimension 0 \(the channels of u\)"),
        ({"A": torch.zeros(4, 3).half()}, "A must be one of float32, got A.dtype=torch.float16"),
        ({"A": torch.zeros(4, 3, device="meta")}, r"A must be on the device of u \(cpu\), got A on meta"),
        ({"B": torch.zeros(2, 3, 6)}, r"B must have 4 dimensions \(B G N T\)"),
        ({"B": torch.zeros(1, 2, 3, 6)}, r"B must have size 2 along dimension 0 \(the batch of u\)"),
        ({"B": torch.zeros(2, 2, 5, 6)}, r"B must have size 3 along dimension 2 \(the state width of A\)"),
        ({"B": torch.zeros(2, 2, 3, 7)}, r"B must have size 6 along dimension 3 \(the steps of u\)"),
        ({"B": torch.zeros(2, 2, 3, 6).half()}, r"B must have the dtype of u \(torch.float32\)"),
        ({"C": torch.zeros(2, 1, 3, 6)}, r"C must have size 2 along dimension 1 \(the groups of B\)"),
        (
            {"B": torch.zeros(2, 3, 3, 6), "C": torch.zeros(2, 3, 3, 6)},
            "the channels of u must be a multiple of the groups of B, got 4 and 3",
        ),
        ({"B": torch.zeros(5, 3)}, r"B must have size 4 along dimension 0 \(the channels of u\)"),
        ({"C": torch.zeros(4, 2)}, r"C must have size 3 along dimension 1 \(the state width of A\)"),
        ({"C": torch.zeros(4, 3).half()}, "C must be one of float32, got C.dtype=torch.float16"),
        ({"A": torch.zeros(4, 3, dtype=torch.complex64)}, "B must be one of complex64, got B.dtype=torch.float32"),
        ({"D": torch.zeros(5)}, r"D must have size 4 along dimension 0 \(the channels of u\)"),
        ({"z": torch.zeros(2, 4, 5)}, r"z must have size 6 along dimension 2 \(the steps of u\)"),
        ({"delta_bias": torch.zeros(4).double()}, "delta_bias must be one of float32"),
        ({"initial_state": torch.zeros(2, 4, 2)}, r"initial_state must have size 3 along dimension 2"),
    ],
    ids=lambda value: value[:40] if isinstance(value, str) else "",
)
def test_bad_arguments_are_named(changes: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        selective_scan(**make(**changes))  # pyright: ignore[reportArgumentType]
