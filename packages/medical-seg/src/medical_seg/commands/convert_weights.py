"""``convert-weights``: official checkpoints to safetensors files that ``model.weights`` takes."""

from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any

import typer

ARCHITECTURES = ("agunet", "daunet", "msa", "vm_unet", "mhs_vm")


def convert_weights(
    source: Annotated[Path, typer.Argument(help="Keras .h5 of AGUNet or DAUNet, or a state dict of the others.")],
    target: Annotated[Path, typer.Argument(help="The .safetensors file to write.")],
    arch: Annotated[str, typer.Option(help="agunet, daunet, msa, vm_unet or mhs_vm.")],
    seed: Annotated[int, typer.Option(help="Of DAUNet's projections that no official file holds.")] = 0,
    threshold: Annotated[float, typer.Option(help="Of MHS-VM's fusion, which no official file holds.")] = 0.5,
) -> Iterator[str]:
    """Convert official weights; train or fine-tune from them with --set model.weights=FILE."""
    from safetensors.torch import save_file

    if arch not in ARCHITECTURES:
        raise ValueError(f"--arch must be one of {', '.join(ARCHITECTURES)}, got {arch!r}")
    if not source.is_file():
        raise ValueError(f"{source}: there is no such file")
    if arch == "msa":
        network, options = _read_msa(source), {}
    elif arch in ("vm_unet", "mhs_vm"):
        network, options = _read_state_spaces(source, {"threshold": threshold} if arch == "mhs_vm" else {}, arch)
    else:
        from medical_seg.models.keras_weights import build_from_keras

        network: Any = build_from_keras(source, arch, seed=seed)
        options = {
            "filters": network.filters,
            "deep_supervision": network.deep_supervision,
            "input_pyramid": network.input_pyramid,
        }
        if arch == "daunet":
            options |= {"attention_guiding": network.attention_guiding, "guide": "holes"}
    about = {"arch": arch, "in_channels": str(network.in_channels), "out_channels": str(network.out_channels)}
    target.parent.mkdir(parents=True, exist_ok=True)
    save_file(
        {name: value.contiguous() for name, value in network.state_dict().items()},
        target,
        metadata=about | {name: repr(value) for name, value in options.items()},
    )
    given = " ".join(f"--option '{name}={value!r}'" for name, value in options.items())
    yield f"wrote {target}: {arch}, {network.in_channels} channels, {network.out_channels} classes"
    yield f"use it: medical-seg train volumes -d FOLDER -m {arch} {given} --set model.weights={target}".replace(
        "  ", " "
    )


def _read_msa(source: Path) -> Any:
    from attn_core import weights
    from medical_seg.models import create_model
    from medical_seg.models.multi_scale_attention import WHOLE_PREFIXES, load_official

    state = weights.read(source, prefixes=WHOLE_PREFIXES, caller="convert-weights").tensors
    first, last = state.get("resnext.layer0.0.weight"), state.get("predict1.weight")
    if first is None or last is None or first.ndim != 4 or last.ndim != 4:
        raise ValueError(f"{source}: no state dict of the official network (predict1.weight is missing)")
    network: Any = create_model("msa", in_channels=first.shape[1], out_channels=last.shape[0])
    return load_official(network, state)


def _read_state_spaces(source: Path, options: dict[str, Any], arch: str) -> tuple[Any, dict[str, Any]]:
    """VM-UNet or MHS-VM of the sizes that a state dict has."""
    from attn_core import weights
    from medical_seg.models import create_model, load_official
    from medical_seg.models.vm_unet import PREFIXES

    state = weights.read(source, prefixes=PREFIXES, caller="convert-weights").tensors
    first, last = state.get("patch_embed.proj.weight"), state.get("final_conv.weight")
    decays = [value for name, value in state.items() if name.endswith(".A_logs")]
    if first is None or last is None or not decays or first.ndim != 4 or last.ndim != 4 or decays[0].ndim != 2:
        raise ValueError(f"{source}: no state dict of the official network (patch_embed, final_conv, A_logs)")

    def depths(part: str) -> tuple[int, ...]:
        places = [name.split(".")[1:4] for name in state if name.startswith(f"{part}.") and ".blocks." in name]
        levels = sorted({int(place[0]) for place in places if place[0].isdigit()})
        return tuple(len({place[2] for place in places if place[0] == str(level)}) for level in levels)

    options |= {"depths": depths("layers"), "depths_up": depths("layers_up"), "width": first.shape[0]}
    options |= {"states": decays[0].shape[1]}
    if arch == "mhs_vm":
        options |= {"heads": 4 if any("scanhead_Z" in name for name in state) else 3}
    network: Any = create_model(arch, in_channels=first.shape[1], out_channels=last.shape[0], **options)
    return load_official(network, state), options
