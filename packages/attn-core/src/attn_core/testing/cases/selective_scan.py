"""Seeded cases of ``selective_scan``."""

from typing import Any

import torch
from torch import Tensor

from attn_core import selective_scan
from attn_core.testing.harness import Case, tensor


def _case(
    name: str,
    *,
    batch: int = 2,
    channels: int = 4,
    steps: int = 9,
    width: int = 3,
    groups: int = 2,
    skip: bool = False,
    gate: bool = False,
    bias: bool = False,
    state: bool = False,
    exact: bool = True,
    constant: str = "",
    pairs: bool = False,
    strided: bool = False,
    varied: bool = False,
    **options: Any,
) -> Case:
    """``exact``: delta in float32 whatever the dtype of u; ``constant``: maps that are; ``pairs``: complex states."""

    def build(dtype: torch.dtype, device: str) -> tuple[list[Any], dict[str, Any]]:
        wide = torch.float64 if dtype == torch.float64 else torch.float32

        def sequence(*shape: int) -> Tensor:
            if strided:  # the steps before the channels in memory, every second of them
                x = tensor(dtype, device, shape[0], steps, *shape[1:-1], 2, gradient=False)[..., 0]
                return x.movedim(1, -1).requires_grad_()
            return tensor(dtype, device, *shape)

        def parameter(*shape: int) -> Tensor:
            if not pairs:
                return tensor(wide, device, *shape)
            x = torch.view_as_complex(tensor(torch.float64, device, *shape, 2, gradient=False))
            return x.to(wide.to_complex()).requires_grad_()

        def state_map(name: str) -> Tensor:
            if name in constant:
                return parameter(channels, width)
            shape = (batch, groups, width, steps)
            return parameter(*shape) if pairs else sequence(*shape)

        u = sequence(batch, channels, steps)
        delta = tensor(torch.float64, device, batch, channels, steps, gradient=False)
        delta = delta if options.get("delta_softplus") else delta.abs() * 0.5
        args = [
            u,
            delta.to(wide if exact else dtype).requires_grad_(),
            rate(parameter(channels, width)),
            state_map("B"),
            state_map("C"),
        ]
        kwargs = dict(options)
        if skip:
            kwargs["D"] = tensor(wide, device, channels)
        if gate:
            kwargs["z"] = sequence(batch, channels, steps)
        if bias:
            kwargs["delta_bias"] = tensor(wide, device, channels)
        if state:
            kwargs["initial_state"] = parameter(batch, channels, width)
        return args, kwargs

    def rate(x: Tensor) -> Tensor:
        """A that lets the states fade."""
        x = x.detach()
        x = torch.complex(-x.real.abs(), x.imag) if pairs else -x.abs()
        return x.requires_grad_()

    return Case(selective_scan, name, build, varied)


def cases() -> list[Case]:
    """Each option alone and all together, both directions, groups, chunks and a rest; and nothing at all."""
    case = _case
    everything = {"skip": True, "gate": True, "bias": True, "state": True, "delta_softplus": True}
    return [
        case("plain"),
        case("skip", skip=True),
        case("gate", gate=True),
        case("bias and softplus", bias=True, delta_softplus=True),
        case("everything", **everything, varied=True),  # pyright: ignore[reportArgumentType]
        case("everything, from the right", **everything, reverse=True, varied=True),  # pyright: ignore[reportArgumentType]
        case("from the right", reverse=True, groups=1, varied=True),
        case("state", state=True),
        case("one group", groups=1),
        case("a group for each channel", groups=4),
        case("width 1", width=1, channels=3, groups=3),
        case("delta in the dtype of u", exact=False, delta_softplus=True, bias=True, batch=1),
        case("two chunks and a rest", steps=131, batch=1, channels=2, width=2, groups=1, skip=True, state=True),
        case("chunks, from the right", steps=131, batch=1, channels=2, width=2, reverse=True, gate=True, state=True),
        case("strided", strided=True, gate=True),
        case("one step", steps=1, **everything),  # pyright: ignore[reportArgumentType]
        case("constant input map", constant="B", skip=True),
        case("constant output map", constant="C", groups=1, reverse=True),
        case("constant maps", constant="BC", **everything, varied=True),
        case("constant maps in chunks", constant="BC", steps=131, batch=1, channels=2, width=2, state=True, gate=True),
        case("constant maps, one step", constant="B", steps=1),
        case("conjugate pairs", pairs=True, **everything),  # pyright: ignore[reportArgumentType]
        case("conjugate pairs, constant maps", pairs=True, constant="BC", skip=True),
        case("conjugate pairs in chunks", pairs=True, constant="C", steps=131, channels=2, reverse=True, state=True),
        case("no image", batch=0, **everything),  # pyright: ignore[reportArgumentType]
        case("no step", steps=0, **everything),  # pyright: ignore[reportArgumentType]
    ]
