"""Adding a module to any network of timm: gates and attention blocks at the outputs of named submodules. ::

    model = timm.create_model("resnet50", pretrained=True)
    print(vision_models.insert(model, "ela"))          # before the addition of every block, as in the paper
    vision_models.insert(model, "ulsam", where="layer4.*", num_groups=8)

The module becomes a child of the place it stands at and runs in a hook behind it: no parameter changes its name, so
that pretrained weights load before and after, and ``state_dict``, ``reset_classifier``, ``features_only`` networks,
copies, pickles, ``torch.compile`` and ``torch.export`` keep it.
"""

# pyright: reportPrivateImportUsage=false
# (timm.layers exports these names, though it lists none)

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import timm
import torch
from timm.layers import EcaModule, SEModule
from torch import Tensor, nn

from attn_core.catalog import Card, Entry, did_you_mean
from attn_core.flops import count_flops
from vision_models.insertion.places import (
    Layout,
    Passing,
    Place,
    grid_of,
    input_size_of,
    passed,
    places,
    run_without_weights,
)
from vision_models.models import MODULES

logger = logging.getLogger(__name__)
ROUNDS = 5  # of the latency, with and without in turns


# timm's gates, to compare the layers of this package with
TIMMS: Mapping[str, Callable[..., nn.Module]] = {"eca": EcaModule, "se": SEModule}


def list_modules() -> list[str]:
    """Names that :func:`insert` takes, sorted."""
    return sorted([*MODULES.names(), *TIMMS])


def _entry(name: str) -> Entry[nn.Module]:
    if name in TIMMS:
        return Entry(name, TIMMS[name], Card("timm", "", "", "Apache-2.0", ""))
    if name not in MODULES.entries:
        raise ValueError(f"insert: unknown module {name!r}{did_you_mean(str(name), list_modules())}")
    return MODULES.entry(name)


@dataclass
class Through:
    """The hook behind a place: its output goes through the child ``name`` as a map (B, C, Y, X)."""

    name: str
    place: Place
    enabled: bool = True

    def __call__(self, host: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
        """The host's output behind the module; of several, the first."""
        if not self.enabled:
            return output
        if isinstance(output, tuple):
            return (self._through(getattr(host, self.name), args, output[0]), *output[1:])
        return self._through(getattr(host, self.name), args, output)

    def _through(self, module: nn.Module, args: tuple[Any, ...], x: Tensor) -> Tensor:
        if self.place.layout == "NCHW":
            return module(x)
        if self.place.layout == "NHWC":
            return module(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)
        prefix = self.place.prefix
        rows, columns = self._grid(x.shape[1] - prefix, args)
        maps = module(x[:, prefix:].transpose(1, 2).unflatten(2, (rows, columns)))
        tokens = maps.flatten(2).transpose(1, 2)
        return torch.cat([x[:, :prefix], tokens], 1) if prefix else tokens

    def _grid(self, tokens: int, args: tuple[Any, ...]) -> tuple[int, int]:
        """Rows and columns: as built for, as the host is told, or in the proportion of what it was built for."""
        if tokens == self.place.grid[0] * self.place.grid[1]:
            return self.place.grid
        for told in args[1:]:
            pair = isinstance(told, tuple | list) and len(told) == 2 and all(isinstance(n, int) for n in told)
            if pair and told[0] * told[1] == tokens:
                return told[0], told[1]
        grid = grid_of(tokens, self.place.grid)
        if grid is None:
            rows, columns = self.place.grid
            raise ValueError(
                f"{self.name}: {tokens} tokens behind {self.place.name!r} are no grid like {rows}×{columns}, which it "
                "was added for; use images of that proportion"
            )
        return grid


@dataclass
class Inserted:
    """What :func:`insert` added; printed, it is a table.

    Attributes:
        module: what was added.
        places: where, in the network's order.
        parameters: added ones; ``parameters_before``: of the network without them.
        multiply_adds: added ones for one image, of convolutions and matrix products (sums and gates cost none);
            ``multiply_adds_before`` likewise.
        latency: milliseconds added to the forward pass of one image, median of interleaved passes; None if not
            measured. ``latency_before`` likewise.
        input_size: channels, height and width of that image.
    """

    module: str
    places: tuple[Place, ...]
    parameters: int
    parameters_before: int
    multiply_adds: int
    multiply_adds_before: int
    latency: float | None
    latency_before: float | None
    input_size: tuple[int, int, int]
    _undo: list[Callable[[], None]] = field(default_factory=list, repr=False)

    def remove(self) -> None:
        """Take it out again; the network is as it was."""
        while self._undo:
            self._undo.pop()()

    def __str__(self) -> str:
        names = [place.name for place in self.places]
        shown = names if len(names) <= 4 else [*names[:2], "…", names[-1]]
        channels, height, width = self.input_size
        rows = [
            ("parameters", f"{self.parameters_before:,}", f"{self.parameters:,}",
             _share(self.parameters, self.parameters_before)),
            ("multiply-adds", f"{self.multiply_adds_before / 1e6:,.2f} M", f"{self.multiply_adds / 1e6:,.2f} M",
             _share(self.multiply_adds, self.multiply_adds_before)),
        ]  # fmt: skip
        if self.latency is not None and self.latency_before is not None:
            rows.append(("latency", f"{self.latency_before:.1f} ms", f"{self.latency:.1f} ms",
                         _share(self.latency, self.latency_before)))  # fmt: skip
        lines = [f"{name:<13} {before:>14} + {added:>10} ({share})" for name, before, added, share in rows]
        where = f"{self.module} at {len(names)} places of one image {channels}×{height}×{width}: {', '.join(shown)}"
        return "\n".join([where, *lines])


def _share(added: float, before: float) -> str:
    return f"{100 * added / before:+.2f} %" if before else "–"


def insert(
    model: nn.Module,
    module: str,
    where: str | Sequence[str] = "branches",
    *,
    input_size: tuple[int, int, int] | None = None,
    layout: Layout | None = None,
    latency: bool = True,
    **options: Any,
) -> Inserted:
    """Add a module to a network, in place, and say what it costs.

    Args:
        model: any network of timm or of this package, also with ``features_only=True``; others as well, if
            ``input_size`` is given.
        module: ``"ela"``, ``"ulsam"``, ``"gaam"``, ``"little_attention"``, or timm's ``"se"`` and ``"eca"``.
        where: ``"branches"``, the ends of the blocks' branches before they are added; ``"blocks"``, behind the
            addition; ``"stages"``, the maps of ``features_only``; or names of submodules, with patterns such as
            ``"layer[34].*.bn2"``; or a list of these.
        input_size: channels, height and width to measure with; what the network was built for by default.
        layout: of maps (B, C, Y, X) or (B, Y, X, C), where it is guessed wrong.
        latency: measure it, which takes ten passes; on the meta device it never is.
        options: of the module, such as ``variant="t"``.

    Returns:
        What was added, with ``remove()``.

    Raises:
        ValueError: an unknown module, option or place, with the nearest known one; an output that is no map; a
            compiled network. The network is then as it was.
    """
    if not isinstance(model, nn.Module):
        raise ValueError(f"insert: model must be a network, got {type(model).__name__}")
    if isinstance(model, torch.jit.ScriptModule) or hasattr(model, "_orig_mod"):
        raise ValueError("insert: the model is compiled already; add modules before torch.compile")
    entry = _entry(module)
    known = (entry.options() or set()) - {"dim", "channels", "device", "dtype"}
    for option in options:
        if option not in known:
            raise ValueError(f"insert: {module} has no option {option!r}{did_you_mean(option, known)}")
    size = input_size_of(model) if input_size is None else input_size
    seen = Passing(size)
    before, operations = _parameters(model), count_flops(lambda: passed(model, seen)) // 2
    found = places(model, where, seen, layout)
    hooks: list[Through] = []
    undo: list[Callable[[], None]] = []
    try:
        for place in found:
            hook, take_out = _added(model, entry, place, options)
            hooks.append(hook)
            undo.append(take_out)
        after = count_flops(lambda: run_without_weights(model, size)) // 2
        times = _times(model, hooks, size) if latency else None
    except Exception:
        for take_out in reversed(undo):
            take_out()
        raise
    added = Inserted(
        module,
        tuple(found),
        _parameters(model) - before,
        before,
        after - operations,
        operations,
        times and times[0],
        times and times[1],
        size,
        undo,
    )
    logger.info("%s", added)
    return added


def _parameters(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


def _added(
    model: nn.Module, entry: Entry[nn.Module], place: Place, options: dict[str, Any]
) -> tuple[Through, Callable[[], None]]:
    """The module as a child of its place, and how to take it out."""
    host, name = model.get_submodule(place.name), entry.name
    if hasattr(host, name):
        raise ValueError(f"insert: {place.name!r} has a {name!r} already; remove() it, or choose another place")
    like = next((p for p in (*host.parameters(), *model.parameters()) if p.is_floating_point()), torch.empty(0))
    with torch.device(like.device):
        new = entry.build(place.dim, **options).to(like.dtype)
    host.add_module(name, new.train(host.training))
    new.is_added = True  # pyright: ignore[reportArgumentType]  so that a second one finds the same places
    hook = Through(name, place)
    handle = host.register_forward_hook(hook)

    def take_out() -> None:
        handle.remove()
        delattr(host, name)

    return hook, take_out


def _times(model: nn.Module, hooks: Sequence[Through], size: tuple[int, int, int]) -> tuple[float, float] | None:
    """Milliseconds that the modules add to a pass, and those of a pass without them; None on the meta device."""
    from attn_core.bench import in_turns

    like = next((p for p in model.parameters() if p.is_floating_point()), torch.empty(0))
    if like.is_meta:
        return None
    x = torch.randn(1, *size, device=like.device, dtype=like.dtype)
    modes = {m: m.training for m in model.modules()}

    def forward(enabled: bool) -> None:
        for hook in hooks:
            hook.enabled = enabled
        with torch.no_grad():
            model(x)

    try:
        model.eval()
        calls = {"with": lambda: forward(True), "without": lambda: forward(False)}
        found = in_turns(calls, device=like.device, rounds=ROUNDS)
    finally:
        for hook in hooks:
            hook.enabled = True
        for m, mode in modes.items():
            m.training = mode
    return found["with"].ms - found["without"].ms, found["without"].ms


def with_module(
    name: str,
    module: str | None = None,
    where: str | Sequence[str] = "branches",
    *,
    input_size: tuple[int, int, int] | None = None,
    options: Mapping[str, Any] | None = None,
    settings: Mapping[str, Any] | None = None,
) -> nn.Module:
    """A network of timm with a module in it, for recipes: ``net=dict(type=with_module, name="resnet18", …)``.

    Args:
        name: of the network.
        module: of :func:`insert`; None adds nothing.
        where, input_size, options: of :func:`insert`, and of the module.
        settings: of ``timm.create_model``.

    Raises: ValueError: as :func:`insert`; timm's own errors for a name that it does not know.
    """
    model = timm.create_model(name, **(settings or {}))
    if module is not None:
        insert(model, module, where, input_size=input_size, latency=False, **(options or {}))
    return model
