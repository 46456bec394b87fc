"""What the benchmark of an operator consists of: cases, and the providers that compute each of them."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from attn_core.dispatch import Backend, interpreting, triton_obstacle

Inputs = dict[str, Any]
Call = Callable[[], Tensor]

OWN: tuple[Backend, ...] = ("torch", "triton")


class UnavailableError(RuntimeError):
    """Why a provider cannot run here."""


@dataclass(frozen=True)
class Provider:
    """One way to compute a case.

    Attributes:
        prepare: inputs → the function that is timed; what it does before (building masks, compiling) is not timed.
        compiles: needs torch.compile, so its first call takes many seconds.
        remark: what a reader of the numbers must know.
    """

    prepare: Callable[[Inputs], Call]
    compiles: bool = False
    remark: str | None = None


@dataclass(frozen=True)
class BenchCase:
    """One size of one operator.

    Attributes:
        inputs: draws the tensors in float64 on the CPU; all floating ones get gradients.
        providers: by name; ``"reference"`` is the judge, ``"torch"`` and ``"triton"`` are ours, the others are peers.
        flops: of the forward pass, counting the scores that the model asks for, not those that a peer computes.
        backward_factor: operations of forward + backward ÷ forward.
        length: number of tokens, if the case belongs to the length sweep.
    """

    name: str
    inputs: Callable[[], Inputs] = field(repr=False)
    providers: dict[str, Provider] = field(repr=False)
    flops: float
    backward_factor: float = 3.5
    length: int | None = None


def backends(call: Callable[[Inputs, Backend], Tensor], first: str) -> dict[str, Provider]:
    """The reference and our backends as providers.

    Args:
        call: runs the operator on the inputs with one backend.
        first: name of the input whose dtype and device decide whether a kernel can run.
    """

    def provider(backend: Backend) -> Provider:
        def prepare(x: Inputs) -> Call:
            reason = triton_obstacle(x[first]) if backend == "triton" else None
            if backend == "triton" and interpreting():
                reason = "the interpreter says nothing about speed"
            if reason:
                raise UnavailableError(reason)
            return lambda: call(x, backend)

        return Provider(prepare)

    return {backend: provider(backend) for backend in ("reference", *OWN)}
