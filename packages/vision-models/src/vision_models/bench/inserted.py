"""What each module that can be inserted costs in a small ResNet and a MobileNet, all in turns."""

from typing import Any

import torch
from torch import nn

from attn_core.bench import in_turns
from vision_models.insertion import list_modules, with_module

# The networks of resnet_modules_digits and mobilenet_modules_digits.
HOSTS: dict[str, dict[str, Any]] = {
    "test_resnet": {
        "in_chans": 1,
        "num_classes": 10,
        "output_stride": 8,
        "channels": (16, 24, 32, 48),
        "stem_width": 8,
    },
    "mobilenetv2_035": {"in_chans": 1, "num_classes": 10},
}
SIDE = 32


def rows(device: torch.device, batch: int) -> list[dict[str, Any]]:
    """A row for each host and module: parameters, and the forward pass beside that of the host alone."""
    found = []
    for host, settings in HOSTS.items():
        torch.manual_seed(0)
        x = torch.randn(batch, 1, SIDE, SIDE, device=device)
        networks: dict[str, nn.Module] = {
            name: with_module(
                host, None if name == "nothing" else name, input_size=(1, SIDE, SIDE), settings=settings
            ).to(device).eval()
            for name in ("nothing", *list_modules())
        }  # fmt: skip

        def forward(network: nn.Module, x: torch.Tensor = x) -> None:
            with torch.no_grad():
                network(x)

        calls = {name: lambda network=network: forward(network) for name, network in networks.items()}
        times = {name: measured.ms for name, measured in in_turns(calls, device=device).items()}
        bare = sum(p.numel() for p in networks["nothing"].parameters())
        for name in list_modules():
            added = sum(p.numel() for p in networks[name].parameters()) - bare
            found.append({
                "setting": f"{host}, batch {batch}, {SIDE}²",
                "module": name,
                "parameters": f"{bare:,} + {added:,}",
                "forward, ms": round(times[name], 2),
                "without, ms": round(times["nothing"], 2),
                "ratio": f"{times[name] / times['nothing']:.2f}",
            })  # fmt: skip
    return found
