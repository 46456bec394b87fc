"""The scan and the short filter under all their names: binaries, Python level, the module Mamba."""

import importlib
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from attn_core.compat import provide


@pytest.fixture(autouse=True)
def _shim() -> Any:
    with provide("mamba"):
        yield


def module(name: str) -> Any:
    return importlib.import_module(name)


def close(actual: Any, expected: Any, bound: float = 1e-10) -> bool:
    return actual.shape == expected.shape and float((actual.detach() - expected.detach()).abs().max()) <= bound


def naive(*arguments: Any) -> tuple[Tensor, Tensor]:
    """The recurrence, one number at a time along the sequence; B and C (D, N) or (B, G, N, L)."""
    u, delta, A, B, C, D, z, bias, softplus = arguments
    delta = delta if bias is None else delta + bias[:, None]
    delta = F.softplus(delta) if softplus else delta
    channels = u.shape[1]

    def at(x: Tensor, t: int) -> Tensor:
        if x.ndim == 2:
            return x
        x = x if x.ndim == 4 else x[:, None]
        return x[..., t].repeat_interleave(channels // x.shape[1], 1)

    h = torch.zeros(u.shape[0], *A.shape, dtype=A.dtype)
    ys = []
    for t in range(u.shape[2]):
        h = torch.exp(delta[:, :, t, None] * A) * h + (delta * u)[:, :, t, None] * at(B, t)
        y = (h * at(C, t)).sum(-1)
        ys.append(2 * y.real if y.is_complex() else y)
    out = torch.stack(ys, -1)
    out = out if D is None else out + D[:, None] * u
    return (out if z is None else out * F.silu(z)), h


def tensors(groups: int | None = 2) -> dict[str, Tensor]:
    shape = (2, 3, 7) if groups is None else (2, groups, 3, 7)
    sizes = {"u": (2, 6, 7), "delta": (2, 6, 7), "A": (6, 3), "B": shape, "C": shape, "D": (6,), "z": (2, 6, 7)}
    sizes["delta_bias"] = (6,)
    drawn = {name: torch.randn(size, dtype=torch.float64) for name, size in sizes.items()}
    drawn["A"] = -drawn["A"].exp()
    return {name: x.requires_grad_() for name, x in drawn.items()}


def test_mamba_ssm_forward_and_raw_backward_equal_the_recurrence() -> None:
    t = tensors()
    expected, last = naive(*t.values(), True)
    ungated, _ = naive(*[*t.values()][:6], None, t["delta_bias"], True)
    grad = torch.randn_like(expected)
    right = dict(zip(t, torch.autograd.grad(expected, [*t.values()], grad), strict=True))
    cuda = module("selective_scan_cuda")
    with torch.no_grad():
        out, x, out_z = cuda.fwd(*t.values(), True)
        assert close(out, ungated)
        assert close(out_z, expected)
        assert close(x[:, :, -1, 1::2], last)
        dz = torch.full_like(t["z"], torch.nan)
        found = cuda.bwd(*t.values(), grad, x, out, dz, True, True)
    assert found[7] is dz
    names = ["u", "delta", "A", "B", "C", "D", "delta_bias", "z"]
    for name, actual in zip(names, found, strict=False):
        assert close(actual, right[name]), name
    assert close(found[8], expected)
    assert all(tensor.grad is None for tensor in t.values())


def test_without_gate_skip_and_bias_their_gradients_are_none() -> None:
    t = tensors()
    cuda = module("selective_scan_cuda")
    args = (t["u"], t["delta"], t["A"], t["B"], t["C"], None, None, None)
    with torch.no_grad():
        out, x = cuda.fwd(*args, False)
        found = cuda.bwd(*args, torch.ones_like(out), x, out, None, False, False)
    assert len(found) == 7
    assert found[5] is None
    assert found[6] is None


@pytest.mark.parametrize(
    ("name", "extra"), [("selective_scan_cuda_oflex", (1, True)), ("selective_scan_cuda_core", (1,))]
)
def test_vmambas_binaries_equal_the_recurrence(name: str, extra: tuple[Any, ...]) -> None:
    t = tensors()
    args = (t["u"], t["delta"], t["A"], t["B"], t["C"], t["D"], t["delta_bias"])
    expected, _ = naive(*args[:6], None, args[6], True)
    grad = torch.randn_like(expected)
    with torch.no_grad():
        out, x = module(name).fwd(*args, True, *extra)
        found = module(name).bwd(*args, grad, x, True, 1)
    assert close(out, expected)
    assert len(found) == 7
    for actual, right in zip(found, torch.autograd.grad(expected, args, grad), strict=True):
        assert close(actual, right)


def test_oflex_alone_returns_float32_for_16_bits() -> None:
    t = {name: x.detach().to(torch.bfloat16) for name, x in tensors().items()}
    args = (t["u"], t["delta"], t["A"].float(), t["B"], t["C"], t["D"].float(), t["delta_bias"].float(), True)
    assert module("selective_scan_cuda_oflex").fwd(*args, 1, True)[0].dtype == torch.float32
    assert module("selective_scan_cuda_oflex").fwd(*args, 1, False)[0].dtype == torch.bfloat16
    assert module("selective_scan_cuda_core").fwd(*args, 1)[0].dtype == torch.bfloat16


@pytest.mark.parametrize("which", ["three dimensions", "constant B", "constant B and C"])
def test_selective_scan_fn_takes_every_form_of_B_and_C(which: str) -> None:
    t = tensors(groups=None if which == "three dimensions" else 2)
    if which != "three dimensions":
        t["B"] = torch.randn(6, 3, dtype=torch.float64, requires_grad=True)
    if which == "constant B and C":
        t["C"] = torch.randn(6, 3, dtype=torch.float64, requires_grad=True)
    fn = module("mamba_ssm.ops.selective_scan_interface").selective_scan_fn
    out, last = fn(**t, delta_softplus=True, return_last_state=True)
    expected, state = naive(*t.values(), True)
    assert close(out, expected)
    assert close(last, state)
    grad = torch.randn_like(out)
    pairs = zip(*(torch.autograd.grad(x, [*t.values()], grad) for x in (out, expected)), strict=True)
    assert all(close(*pair) for pair in pairs)


def test_complex_A_keeps_one_of_each_conjugate_pair() -> None:
    t = tensors()
    A = torch.complex(-torch.rand(6, 3), torch.randn(6, 3)).to(torch.complex128).requires_grad_()
    pairs = [torch.randn(2, 2, 3, 14, dtype=torch.float64, requires_grad=True) for _ in range(2)]
    fn = module("selective_scan").selective_scan_fn
    out = fn(t["u"], t["delta"], A, *pairs, t["D"], t["z"], t["delta_bias"], True)
    whole = [torch.view_as_complex(x.unflatten(-1, (7, 2))) for x in pairs]
    expected, _ = naive(t["u"], t["delta"], A, *whole, t["D"], t["z"], t["delta_bias"], True)
    assert close(out, expected)
    for actual, right in zip(*(torch.autograd.grad(x.sum(), [A, *pairs]) for x in (out, expected)), strict=True):
        assert close(actual, right)


@pytest.mark.parametrize("constant", ["", "B", "BC"])
def test_raw_backward_of_complex_A_and_of_constant_maps_equals_the_recurrence(constant: str) -> None:
    t = tensors()
    A = torch.complex(-torch.rand(6, 3), torch.randn(6, 3)).to(torch.complex128).requires_grad_()
    maps = []
    for name in "BC":
        shape = (6, 3, 2) if name in constant else (2, 2, 3, 14)
        x = torch.randn(shape, dtype=torch.float64)
        maps.append((torch.view_as_complex(x) if name in constant else x).requires_grad_())
    args = (t["u"], t["delta"], A, *maps, t["D"], t["z"], t["delta_bias"])
    whole = [x if x.ndim == 2 else torch.view_as_complex(x.unflatten(-1, (7, 2))) for x in maps]
    expected, _ = naive(*args[:3], *whole, *args[5:], True)
    grad = torch.randn_like(expected)
    right = torch.autograd.grad(expected, args, grad)
    cuda = module("selective_scan_cuda")
    with torch.no_grad():
        out, x, out_z = cuda.fwd(*args, True)
        found = cuda.bwd(*args, grad, x, out, None, True, False)
    assert close(out_z, expected)
    for actual, wanted in zip(found, (*right[:6], right[7], right[6]), strict=True):
        assert close(actual, wanted)
    assert all(tensor.grad is None for tensor in args)


def test_the_mixer_with_complex_A_is_its_parts() -> None:
    interface = module("mamba_ssm.ops.selective_scan_interface")
    A = torch.complex(-torch.rand(6, 3), torch.randn(6, 3)).to(torch.complex128)
    xz, filters = torch.randn(2, 12, 7, dtype=torch.float64), torch.randn(6, 1, 4, dtype=torch.float64)
    project, step = torch.randn(2 + 2 * 6, 6, dtype=torch.float64), torch.randn(6, 2, dtype=torch.float64)
    y = interface.mamba_inner_fn(xz, filters, None, project, step, None, None, A, delta_softplus=True)
    x, z = xz.chunk(2, 1)
    x = convolved(x, filters[:, 0], None)
    low, *maps = F.linear(x.mT, project).split([2, 6, 6], -1)
    B, C = (torch.view_as_complex(m.unflatten(-1, (3, 2)).contiguous()).mT[:, None] for m in maps)
    expected, _ = naive(x, F.linear(low, step).mT, A, B, C, None, z, None, True)
    assert close(y, expected.mT)


def convolved(x: Tensor, w: Tensor, b: Tensor | None, before: Tensor | None = None) -> Tensor:
    before = x.new_zeros(*x.shape[:2], w.shape[1] - 1) if before is None else before
    return F.silu(F.conv1d(torch.cat([before, x], -1), w[:, None], b, groups=x.shape[1]))


def filter_inputs() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    sizes = ((2, 5, 9), (5, 4), (5,), (2, 5, 3))
    x, w, b, before = (torch.randn(size, dtype=torch.float64, requires_grad=True) for size in sizes)
    return x, w, b, before


def test_the_filter_in_the_forms_of_three_versions() -> None:
    x, w, b, before = filter_inputs()
    cuda = module("causal_conv1d_cuda")
    plain, after = convolved(x, w, b), convolved(x, w, b, before)
    assert close(cuda.causal_conv1d_fwd(x, w, b, True), plain)  # 1.0
    final = torch.full_like(before, torch.nan)
    assert close(cuda.causal_conv1d_fwd(x, w, b, None, before, final, True), after)  # 1.1 to 1.5
    assert close(final, x[..., -3:])
    out = torch.full_like(x, torch.nan).detach()
    assert cuda.causal_conv1d_fwd(x, w, b, None, None, out, None, True) is None  # 1.6
    assert close(out, plain)
    with pytest.raises(TypeError, match=r"causal_conv1d_fwd: takes 4, 7, 8 arguments .* got 5"):
        cuda.causal_conv1d_fwd(x, w, b, None, True)


def test_the_filters_raw_backward_equals_autograd_in_all_forms() -> None:
    x, w, b, before = filter_inputs()
    grad = torch.randn_like(x)
    right = torch.autograd.grad(convolved(x, w, b, before), (x, w, b, before), grad)
    cuda = module("causal_conv1d_cuda")
    with torch.no_grad():
        dx = torch.full_like(x, torch.nan)
        found = cuda.causal_conv1d_bwd(x, w, b, grad, None, before, None, dx, True, True)
        assert found[0] is dx
        assert all(close(actual, expected) for actual, expected in zip(found, right, strict=True))
        filled = [torch.full_like(t, torch.nan) for t in (x, w, b, before)]
        last = filled[-1]
        assert cuda.causal_conv1d_bwd(x, w, b, grad, None, before, None, *filled[:3], last, True) is None
        assert all(close(actual, expected) for actual, expected in zip(filled, right, strict=True))
    assert all(t.grad is None for t in (x, w, b, before))


def test_tokens_of_other_sequences_are_not_read() -> None:
    x, w, b, _ = filter_inputs()
    sequence = torch.tensor([[0] * 4 + [1] * 5, [0] * 9], dtype=torch.int32)
    y = module("causal_conv1d").causal_conv1d_fn(x, w, b, seq_idx=sequence, activation="silu")
    assert close(y[0, :, :4], convolved(x[:1, :, :4], w, b)[0])
    assert close(y[0, :, 4:], convolved(x[:1, :, 4:], w, b)[0])
    assert close(y[1], convolved(x[1:], w, b)[0])


@pytest.mark.parametrize("ring", [False, True])
def test_updates_token_by_token_equal_the_whole_sequence(ring: bool) -> None:
    x, w, b, _ = (t.detach() for t in filter_inputs())
    update = module("causal_conv1d").causal_conv1d_update
    state = torch.zeros(2, 5, 4, dtype=torch.float64)
    steps = [
        update(x[..., t], state, w, b, "silu", torch.full((2,), t, dtype=torch.int32) if ring else None)
        for t in range(9)
    ]
    assert close(torch.stack(steps, -1), convolved(x, w, b))


def test_states_of_chosen_rows_are_updated_alone() -> None:
    x, w, b, _ = (t.detach() for t in filter_inputs())
    states = torch.randn(4, 5, 3, dtype=torch.float64)
    rows, before = torch.tensor([2, 0], dtype=torch.int32), states.clone()
    y = module("causal_conv1d").causal_conv1d_update(x, states, w, b, "silu", conv_state_indices=rows)
    assert close(y, convolved(x, w, b, before[[2, 0]]))
    assert close(states[[2, 0]], x[..., -3:])
    assert close(states[[1, 3]], before[[1, 3]])


def test_mamba_module_step_by_step_equals_the_whole_sequence_and_its_inner_function() -> None:
    mamba = module("mamba_ssm").Mamba(d_model=8, d_state=4, d_conv=4, expand=2).double()
    x = torch.randn(2, 6, 8, dtype=torch.float64)
    whole = mamba(x)
    conv, ssm = mamba.allocate_inference_cache(2, 6)
    with torch.no_grad():
        steps = torch.cat([mamba.step(x[:, t : t + 1], conv, ssm)[0] for t in range(6)], 1)
    assert close(steps, whole)
    inner = module("mamba_ssm").mamba_inner_fn(
        *(mamba.in_proj(x).transpose(1, 2), mamba.conv1d.weight, mamba.conv1d.bias, mamba.x_proj.weight),
        *(mamba.dt_proj.weight, mamba.out_proj.weight, None, -mamba.A_log.exp()),
        D=mamba.D,
        delta_bias=mamba.dt_proj.bias,
        delta_softplus=True,
    )
    assert close(inner, whole)
    assert sorted(name for name, _ in mamba.named_parameters()) == [
        *("A_log", "D", "conv1d.bias", "conv1d.weight", "dt_proj.bias", "dt_proj.weight", "in_proj.weight"),
        *("out_proj.weight", "x_proj.weight"),
    ]


def test_what_is_not_provided_says_so() -> None:
    with pytest.raises(ImportError, match="Mamba2"):
        exec("from mamba_ssm import Mamba2")
    with pytest.raises(AttributeError, match=r"mamba_ssm\.Mamba2 is not provided by attn_core's shim"):
        _ = module("mamba_ssm").Mamba2
