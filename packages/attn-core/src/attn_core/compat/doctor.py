"""Reads the imports of a repository, without running any of it, and says which shims and repairs it needs."""

import ast
import re
import warnings
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

# Modules, with all below them, that a shim stands for.
SHIM_OF = {
    "MultiScaleDeformableAttention": "msda",
    "groundingdino._C": "msda",
    "dfa3D._ext": "msda",
    "selective_scan_cuda": "mamba",
    "selective_scan_cuda_oflex": "mamba",
    "selective_scan_cuda_core": "mamba",
    "selective_scan": "mamba",
    "causal_conv1d_cuda": "mamba",
    "causal_conv1d": "mamba",
    "mamba_ssm": "mamba",
    "mmcv._ext": "mmcv_ext",
    "mmcv.ops": "mmcv_ext",
    "spatial_correlation_sampler": "spatial_correlation_sampler",
    "swattention": "swattention",
}
REPAIR_OF = {
    "pkg_resources": "pkg_resources",
    "torch._six": "torch._six",
    "torchvision.ops.misc._NewEmptyTensorOp": "torchvision",
    "torchvision.ops.misc._output_size": "torchvision",
    "torchvision.ops._new_empty_tensor": "torchvision",
}
REMOVED_OUTPUTS = re.compile(r"(GreedySearch|Sample|BeamSearch|BeamSample|ContrastiveSearch)(Enc|Dec)\w*Output")
REMOVED_NUMPY = {"float", "int", "object", "str", "complex", "long", "unicode"}
BEYOND = {
    "mmcv.runner": "mmcv 1.x; no mmcv 2 has it, and mmcv 1 does not build for today's torch",
    "mmcv.parallel": "mmcv 1.x; no mmcv 2 has it, and mmcv 1 does not build for today's torch",
    "torch_scatter": "a compiled extension without a shim",
    "pointnet2_ops": "a compiled extension without a shim",
    "DCNv3": "a compiled extension without a shim",
    "dkernel": "Triton kernels without a shim; they need a GPU",
    "lightning_attn": "Triton kernels without a shim; they need a GPU",
}
# Names of natten by version, newest last; the first that fits all of a repository is taken.
OLD_NATTEN = re.compile(r"natten[123]d(qkrpb|qk|av)")
NATTEN_15 = re.compile(r"na[123]d_qk_with_bias")
NATTEN_17 = re.compile(r"na[123]d_(qk|av)$|use_fused_na|use_tiled_na|use_gemm_na|has_fused_na")
NATTEN_PIN = re.compile(r"natten\s*==\s*(0\.\d+)")


@dataclass
class Diagnosis:
    """What a repository needs: names → where that is seen first.

    Attributes:
        beyond: what neither shims nor repairs can help.
    """

    folder: Path
    files: int = 0
    shims: dict[str, str] = field(default_factory=dict)
    repairs: dict[str, str] = field(default_factory=dict)
    beyond: dict[str, str] = field(default_factory=dict)
    unread: list[str] = field(default_factory=list)

    def text(self) -> str:
        """For a terminal."""
        lines = [f"{self.folder}: {self.files} Python files"]
        for title, found in (("shim", self.shims), ("repair", self.repairs), ("not helped", self.beyond)):
            lines += [f"  {title:10}  {name:28} {where}" for name, where in sorted(found.items())]
        lines += [f"  {'unread':10}  {file}" for file in self.unread]
        if not (self.shims or self.repairs or self.beyond):
            return "\n".join([*lines, "  needs neither shims nor repairs"])
        options = [f"--provide {','.join(sorted(self.shims))}"] if self.shims else []
        options += [f"--legacy '{','.join(sorted(self.repairs))}'"] if self.repairs else []
        if options:
            lines.append(f"  run it so   python -m attn_core.compat run {' '.join(options)} SCRIPT")
        return "\n".join(lines)


def diagnose(folder: Path) -> Diagnosis:
    """Read all Python files of a folder.

    Raises:
        ValueError: there is no such folder, or no Python file in it.
    """
    if not folder.is_dir():
        raise ValueError(f"there is no folder {folder}")
    result = Diagnosis(folder)
    seen = _Natten()
    for file in sorted(folder.rglob("*.py")):
        if any(part.startswith(".") for part in file.relative_to(folder).parts):
            continue
        result.files += 1
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                tree = ast.parse(file.read_text(encoding="utf-8", errors="replace"))
        except (SyntaxError, ValueError):
            result.unread.append(str(file.relative_to(folder)))
            continue
        for name, line in _names(tree):
            _file_under(result, seen, name, f"{file.relative_to(folder)}:{line}  {name}")
    if not result.files:
        raise ValueError(f"there is no Python file in {folder}")
    _choose_versions(result, seen, folder)
    return result


@dataclass
class _Natten:
    names: dict[str, str] = field(default_factory=dict)  # what is used of natten → where
    flash: dict[str, str] = field(default_factory=dict)


def _names(tree: ast.Module) -> Iterator[tuple[str, int]]:
    """Dotted names that a file imports or reads from imported modules, and extensions that it loads by name."""
    aliases: dict[str, str] = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                aliases[alias.asname or alias.name.partition(".")[0]] = (
                    alias.name if alias.asname else alias.name.partition(".")[0]
                )
                yield alias.name, node.lineno
        elif isinstance(node, ast.ImportFrom) and node.module and node.level == 0:
            for alias in node.names:
                aliases[alias.asname or alias.name] = f"{node.module}.{alias.name}"
                yield f"{node.module}.{alias.name}", node.lineno
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute):
            dotted = _dotted(node, aliases)
            if dotted is not None:
                yield dotted, node.lineno
        elif isinstance(node, ast.Call):
            yield from _call(node, aliases)


def _call(node: ast.Call, aliases: dict[str, str]) -> Iterator[tuple[str, int]]:
    attribute = node.func.attr if isinstance(node.func, ast.Attribute) else None
    if attribute == "cuda":
        yield "cuda()", node.lineno
    listed = [x.value for x in ast.walk(node) if isinstance(x, ast.Constant) and isinstance(x.value, str)]
    if attribute == "load_ext" and "_ext" in listed:
        yield ("dfa3D._ext" if "wms_deform_attn_forward" in listed else "mmcv._ext"), node.lineno
    called = aliases.get(node.func.id) if isinstance(node.func, ast.Name) else None
    if called is not None and called.startswith("natten") and "NeighborhoodAttention" in called:
        for keyword in node.keywords:
            yield f"natten.({keyword.arg}=)", node.lineno
    if isinstance(node.func, ast.Name) and node.func.id == "hasattr" and node.args:
        owner = node.args[0].id if isinstance(node.args[0], ast.Name) else ""
        if aliases.get(owner) == "natten" and "context" in listed:
            yield "natten.(asks for its version)", node.lineno


def _dotted(node: ast.expr, aliases: dict[str, str]) -> str | None:
    parts: list[str] = []
    while isinstance(node, ast.Attribute):
        parts.append(node.attr)
        node = node.value
    if not isinstance(node, ast.Name) or node.id not in aliases:
        return None
    return ".".join([aliases[node.id], *reversed(parts)])


def _file_under(result: Diagnosis, seen: _Natten, name: str, where: str) -> None:
    for table, found in ((SHIM_OF, result.shims), (REPAIR_OF, result.repairs)):
        for module, needed in table.items():
            if name == module or name.startswith(f"{module}."):
                found.setdefault(needed, where)
    for module, reason in BEYOND.items():
        if name == module or name.startswith(f"{module}."):
            result.beyond.setdefault(module, f"{where.partition('  ')[0]}  {reason}")
    package, _, rest = name.partition(".")
    if package == "natten":
        seen.names.setdefault(rest, where)
    elif package == "flash_attn":
        seen.flash.setdefault(rest, where)
    elif package == "numpy" and rest in REMOVED_NUMPY:
        result.repairs.setdefault("numpy", where)
    elif package == "transformers" and REMOVED_OUTPUTS.search(rest):
        result.repairs.setdefault("transformers", where)
    elif name == "torch.cuda.device":
        result.repairs.setdefault("torch.cuda.device", where)
    elif name == "cuda()":
        result.repairs.setdefault("cuda()", where)


def _choose_versions(result: Diagnosis, seen: _Natten, folder: Path) -> None:
    if seen.names:
        where = next(iter(seen.names.values()))
        result.shims[f"natten@{_natten_version(seen, folder)}"] = where
    if seen.flash:
        old = any("unpadded" in name or name.endswith("unpad_input") for name in seen.flash)
        result.shims["flash_attn@2.6" if old else "flash_attn"] = next(iter(seen.flash.values()))


def _natten_version(seen: _Natten, folder: Path) -> str:
    """By what is used; then by a pin in the repository's text files; 0.14 where both are silent."""
    names = [name.rpartition(".")[2] for name in seen.names]
    keywords = " ".join(seen.names)
    if any(NATTEN_15.fullmatch(name) for name in names):
        return "0.15"
    if any(OLD_NATTEN.fullmatch(name) for name in names):
        return "0.14"
    if "(embed_dim=)" in keywords or "(stride=)" in keywords or {"merge_attentions", "attention"} & set(names):
        return "0.20"
    if "asks for its version" in keywords or "(bias=)" in keywords:
        return "0.14"
    if "(rel_pos_bias=)" in keywords or "(is_causal=)" in keywords or any(NATTEN_17.search(name) for name in names):
        return "0.17"
    for file in [*folder.glob("*.txt"), *folder.glob("*.md"), *folder.glob("*/*.txt"), *folder.glob("*.toml")]:
        pin = NATTEN_PIN.search(file.read_text(encoding="utf-8", errors="replace"))
        if pin:
            wanted = pin[1]
            known = [v for v in ("0.14", "0.15", "0.17", "0.20") if float(v[2:]) <= float(wanted[2:])]
            return known[-1] if known else "0.14"
    return "0.14"
