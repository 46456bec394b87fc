"""Where in a network a module can be added: names of places, what passes there, and in which layout.

A place is the output of a submodule. Besides modules' names there are ``"branches"``, ``"blocks"`` and ``"stages"``,
read from what timm's models say of themselves (``group_matcher``, ``feature_info``) and from one pass of shapes.
"""

import fnmatch
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.func import functional_call

from attn_core.catalog import did_you_mean

Layout = Literal["NCHW", "NHWC", "NLC"]
ROLES = ("blocks", "branches", "stages")
# Children of a block that are beside the branch, or change nothing that a gate would see.
ASIDE = re.compile(r"(?i)down_?sample|shortcut|skip|drop|^identity|^ls\d*$|^layer_?scale")
BLOCK_CLASSES = re.compile(r"Block|Bottleneck|Residual|DenseLayer|DepthwiseSeparable|^ConvBnAct$")


@dataclass(frozen=True)
class Place:
    """The output of a submodule.

    Attributes:
        name: of the submodule.
        dim: channels.
        layout: where the channels are: ``"NCHW"``, ``"NHWC"``, or tokens ``"NLC"``.
        grid: rows and columns of the tokens, or of the map, at the size that was looked at.
        prefix: tokens before those of the map.
    """

    name: str
    dim: int
    layout: Layout
    grid: tuple[int, int]
    prefix: int = 0


@dataclass
class Passing:
    """What a pass of shapes through a network has seen."""

    input_size: tuple[int, int, int]
    order: list[str] = field(default_factory=list)  # names in the order in which their calls end
    outputs: dict[str, Any] = field(default_factory=dict)  # of the last call
    versions: dict[str, int] = field(default_factory=dict)  # of the outputs then: more once they are added to


def input_size_of(model: nn.Module) -> tuple[int, int, int]:
    """Channels, height and width that a timm network was built for.

    Raises: ValueError: it does not say.
    """
    cfg: Any = getattr(model, "pretrained_cfg", None) or getattr(model, "default_cfg", None)
    sizes = (getattr(getattr(model, "patch_embed", None), "img_size", None), cfg and cfg.get("input_size"))
    size = next((tuple(size)[-2:] for size in sizes if size), None)
    convolution = next((m for m in model.modules() if isinstance(m, nn.Conv2d)), None)
    if size is None or convolution is None:
        raise ValueError(
            f"insert: this {type(model).__name__} names no input size; pass input_size=(channels, height, width)"
        )
    channels, pictured = convolution.in_channels, cfg["input_size"][0] if cfg else 3
    unfolded = (channels / pictured) ** 0.5  # some networks move squares of pixels to the channels first
    return (pictured if unfolded > 1 and unfolded.is_integer() else channels), int(size[0]), int(size[1])


def passed(model: nn.Module, seen: Passing) -> None:
    """One forward pass in eval mode, on the meta device where the network allows it, watched at every submodule."""

    def watch(name: str) -> Any:
        def after(_: nn.Module, __: Any, output: Any) -> None:
            seen.order.append(name)
            first: Any = output[0] if isinstance(output, tuple | list) and output else output
            seen.outputs[name] = first
            seen.versions[name] = first._version if isinstance(first, Tensor) else 0

        return after

    handles = [module.register_forward_hook(watch(name)) for name, module in model.named_modules() if name]
    try:
        run_without_weights(model, seen.input_size)
    finally:
        for handle in handles:
            handle.remove()


def run_without_weights(model: nn.Module, input_size: tuple[int, int, int]) -> None:
    """A forward pass of one image in eval mode; nothing is computed unless the network needs real numbers."""
    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        with torch.no_grad():
            tensors = {**dict(model.named_parameters()), **dict(model.named_buffers())}
            empty = {name: torch.empty_like(value, device="meta") for name, value in tensors.items()}
            like = next((value for value in tensors.values() if value.is_floating_point()), torch.empty(0))
            try:
                functional_call(model, empty, torch.empty(1, *input_size, device="meta", dtype=like.dtype))
            except (NotImplementedError, RuntimeError):  # of what has no meta kernel, or keeps tensors elsewhere
                _run(model, torch.zeros(1, *input_size, device=like.device, dtype=like.dtype))
    finally:
        for module, mode in modes.items():
            module.training = mode


def _run(model: nn.Module, x: Tensor) -> None:
    try:
        model(x)
    except (NotImplementedError, RuntimeError) as error:
        raise ValueError(
            f"insert: the network fails on input_size={tuple(x.shape[1:])}: {str(error).splitlines()[0]}; pass the "
            "size that it takes"
        ) from error


def places(model: nn.Module, where: str | Sequence[str], seen: Passing, layout: Layout | None = None) -> list[Place]:
    """The places that ``where`` names, in the network's order.

    Raises: ValueError: unknown names, the classifier, or outputs that are no maps and no tokens.
    """
    modules = dict(model.named_modules())
    wanted = [where] if isinstance(where, str) else list(where)
    if not wanted or not all(isinstance(name, str) for name in wanted):
        raise ValueError(f"insert: where must be a name or a list of names, got where={where!r}")
    names: list[str] = []
    for name in wanted:
        names += [_answering(found, modules) for found in _named(model, name, seen, modules)]
    classifier = _classifiers(model)
    for name in names:
        inside = next((c for c in classifier if name == c or name.startswith(f"{c}.")), None)
        if inside is not None:
            raise ValueError(f"insert: where={name!r} belongs to the classifier, which reset_classifier replaces")
        if name not in seen.outputs:
            raise ValueError(f"insert: where={name!r} is never called in a forward pass; name a module that is")
    order = list(modules)
    return [_place(model, name, seen, modules, layout) for name in sorted(set(names), key=order.index)]


def _named(model: nn.Module, name: str, seen: Passing, modules: Mapping[str, nn.Module]) -> list[str]:
    """Names of modules behind one word of ``where``: a role, a name, or a pattern of one part for each part."""
    if name in ROLES:
        blocks = _blocks(model, seen, modules)
        found = {
            "blocks": lambda: blocks,
            "branches": lambda: [branch for block in blocks if (branch := _branch(block, seen, modules))],
            "stages": lambda: _stages(model, blocks, modules),
        }[name]()
        if not found:
            others = " or ".join(repr(role) for role in ROLES if role != name)
            raise ValueError(
                f"insert: this {type(model).__name__} does not tell its {name}; say where={others}, or names of "
                "modules such as " + ", ".join(repr(n) for n in list(seen.outputs)[-4:-1])
            )
        return found
    if name in modules and name:
        return [name]
    parts = name.split(".")
    if any(letter in name for letter in "*?["):
        known = [other.split(".") for other in modules]
        fitting = [
            ".".join(other)
            for other in known
            if len(other) == len(parts) and all(fnmatch.fnmatchcase(o, p) for o, p in zip(other, parts, strict=True))
        ]
        if fitting:
            return fitting
        shape = re.sub(r"[*?\[\]]", "", name)
        raise ValueError(f"insert: no module fits where={name!r}{did_you_mean(shape, modules)}")
    raise ValueError(f"insert: there is no where={name!r}{did_you_mean(name, [*modules, *ROLES])}")


def _answering(name: str, modules: Mapping[str, nn.Module]) -> str:
    """The module whose output a Sequential returns: it calls all of its children, so that none can be added to it."""
    while isinstance(module := modules[name], nn.Sequential | nn.ModuleList | nn.ModuleDict):
        if type(module).forward is not nn.Sequential.forward or len(module) == 0:
            raise ValueError(
                f"insert: where={name!r} is a {type(module).__name__} of {len(module)} modules, to which none can be "
                "added; name one of them"
            )
        name = f"{name}.{next(reversed(module._modules))}"
    return name


def _blocks(model: nn.Module, seen: Passing, modules: Mapping[str, nn.Module]) -> list[str]:
    """Modules that timm counts as one layer when it groups parameters; else those whose class is called a block."""
    inner, prefix = (model.model, "model.") if hasattr(model, "model") else (model, "")
    called = [name for name in modules if name in seen.outputs and len(list(modules[name].children())) > 0]
    patterns: list[str] = []
    if callable(matcher := getattr(inner, "group_matcher", None)):
        groups: Any = matcher(coarse=False)
        rules: Any = groups.get("blocks", ()) if isinstance(groups, Mapping) else ()  # a few are functions
        rules = [(rules, None)] if isinstance(rules, str) else rules
        rules = [(rule, None) if isinstance(rule, str) else rule for rule in rules]
        patterns = [pattern for pattern, layer, *_ in rules if layer is None and "(" in pattern]
    found = [
        name
        for name in called
        if name.startswith(prefix) and any(re.fullmatch(p, name.removeprefix(prefix)) for p in patterns)
    ]
    found = [name for name in found if not ASIDE.search(name.rpartition(".")[2])]
    named = [name for name in called if BLOCK_CLASSES.search(type(modules[name]).__name__)]
    outer = [name for name in named if not any(name.startswith(f"{other}.") for other in named)]
    if not found:
        return outer
    # what holds blocks is a stage, though its parameters are one group
    stages = [n for n in found if isinstance(modules[n], nn.Sequential) or "Stage" in type(modules[n]).__name__]
    inner_blocks = {name: [other for other in outer if other.startswith(f"{name}.")] for name in stages}
    return [block for name in found for block in (inner_blocks.get(name) or [name])]


def _stages(model: nn.Module, blocks: Sequence[str], modules: Mapping[str, nn.Module]) -> list[str]:
    """Modules whose maps ``features_only`` gives, but for the stem's."""
    inner, prefix = (model.model, "model.") if hasattr(model, "model") else (model, "")
    found = []
    for row in getattr(inner, "feature_info", None) or ():
        name = prefix + row["module"]
        name = name if name in modules else name.replace(".", "_")  # as features_only flattens
        inside = any(block == name or block.startswith(f"{name}.") or name.startswith(f"{block}.") for block in blocks)
        if name in modules and (inside or not blocks):
            found.append(name)
    return found


def _branch(block: str, seen: Passing, modules: Mapping[str, nn.Module]) -> str | None:
    """The child of a block that ends its last branch, before the branch is added to the input, if it is.

    Where a child already returns what the block returns, an addition can only stand inside it.
    """
    result = seen.outputs[block]
    if not isinstance(result, Tensor):
        return None
    for name in reversed(seen.order):
        parent, _, child = name.rpartition(".")
        output = seen.outputs[name]
        module = modules[name]
        if parent != block or ASIDE.search(child) or getattr(module, "is_added", False):
            continue
        if next(module.parameters(), None) is None:  # activations, dropout
            continue
        if not isinstance(output, Tensor) or output.numel() != result.numel():
            continue
        unchanged = output is result and seen.versions[name] == seen.versions[block]
        if unchanged and len(list(module.children())) > 0:
            return _branch(name, seen, modules) or name
        return name
    return None


def _classifiers(model: nn.Module) -> Iterator[str]:
    cfg: Any = getattr(model, "pretrained_cfg", None) or getattr(model, "default_cfg", None) or {}
    named = cfg.get("classifier") or ()
    yield from (named,) if isinstance(named, str) else named


def _place(
    model: nn.Module, name: str, seen: Passing, modules: Mapping[str, nn.Module], layout: Layout | None
) -> Place:
    output = seen.outputs[name]
    shape = tuple(output.shape) if isinstance(output, Tensor) else None
    if shape is None or len(shape) not in (3, 4) or shape[0] != 1:
        what = f"of shape {shape} for one image" if shape else f"a {type(output).__name__}"
        raise ValueError(
            f"insert: the output of where={name!r} is {what}; a module takes maps (B, C, Y, X) or (B, Y, X, C), or "
            "tokens (B, N, C), of whole images"
        )
    channels, last = _channels(modules[name])
    _, height, width = seen.input_size
    if len(shape) == 4:
        if layout not in ("NCHW", "NHWC"):
            layout = _layout_of_map(shape, channels, last=last)
        dim, grid = (shape[1], shape[2:]) if layout == "NCHW" else (shape[3], shape[1:3])
        if abs(grid[0] * width - grid[1] * height) < max(height, width):  # or the map is cut into pieces
            return Place(name, dim, layout, (grid[0], grid[1]))
        raise ValueError(f"insert: the output of where={name!r}, of shape {shape}, is no map of an image "
                         f"{height}×{width} in layout {layout}; give layout=, or name another place")  # fmt: skip
    own = getattr(model, "num_prefix_tokens", None)
    for prefix in [*([own] if own is not None else []), 0, 1, 2]:
        grid = grid_of(shape[1] - prefix, (height, width))
        if grid is not None:
            return Place(name, shape[2], "NLC", grid, prefix)
    raise ValueError(
        f"insert: the {shape[1]} tokens of where={name!r} are no grid of an image {height}×{width}; name another place"
    )


def _channels(module: nn.Module) -> tuple[int | None, bool]:
    """Channels of what a module's last layer with weights gives, and whether they are on the last axis."""
    for leaf in reversed(list(module.modules())):
        if isinstance(leaf, nn.Linear):
            return leaf.out_features, True
        if isinstance(leaf, nn.Conv2d):
            return leaf.out_channels, False
        if isinstance(leaf, nn.LayerNorm):  # timm's for maps says so in its name
            return leaf.normalized_shape[-1], not type(leaf).__name__.startswith("LayerNorm2d")
        if isinstance(leaf, nn.GroupNorm | nn.modules.batchnorm._BatchNorm):
            return (leaf.num_channels if isinstance(leaf, nn.GroupNorm) else leaf.num_features), False
    return None, False


def _layout_of_map(shape: tuple[int, ...], channels: int | None, *, last: bool) -> Layout:
    """Where the channels of a map are: on the axis as long as the last layer is wide, else the one that is no side."""
    first, fits = shape[1] == channels, shape[3] == channels
    if first != fits:
        return "NCHW" if first else "NHWC"
    if first and fits:
        return "NHWC" if last else "NCHW"
    return "NHWC" if shape[1] == shape[2] != shape[3] else "NCHW"


def grid_of(tokens: int, like: tuple[int, int]) -> tuple[int, int] | None:
    """Rows and columns of so many tokens, in the proportion of ``like``; None where there are none."""
    rows = round((tokens * like[0] / like[1]) ** 0.5) if tokens > 0 else 0
    return (rows, tokens // rows) if rows and tokens % rows == 0 else None
