"""U-shaped networks of any state-space block by name: ``ssm_unet:ss2d``, ``ssm_unet:umamba``, …

Survey: Heidari et al., Computation-Efficient Era: A Comprehensive Survey of State Space Models in Medical Image
Analysis, arXiv 2406.03430; a list of links: https://github.com/xmindflow/Awesome_Mamba.

The U is VM-UNet's, in one to three dimensions: with ``ss2d`` and ``multi_head`` the networks are VM-UNet and MHS-VM,
names and numbers alike, and load their weights. With other blocks they are no network of a paper: the survey's blocks
in one frame, so that what differs between two of them is the block.
Checked: tests/models/test_ssm_unet.py; blocks: tests/layers/state_space/test_blocks.py.

Shapes: (B, C, *grid) with sides that ``divisor`` divides → (B, K, *grid) logits.
"""

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

from attn_core.catalog import Card, Entry
from medical_seg.layers.state_space import BLOCKS, create_block
from medical_seg.models.vm_unet import PATCH, Shallow, ShallowUp, StateSpaceUNet

PREFIX = "ssm_unet"
PLANAR = tuple(name for name in BLOCKS.names() if getattr(BLOCKS.card(name), "dims", ()) == (2,))


class SSMUNet(StateSpaceUNet):
    """VM-UNet's U around a block of the library.

    Args:
        in_channels: C.
        out_channels: K, the number of classes with the background; 1 for logits of a foreground.
        block: one of `medical_seg.layers.state_space.list_blocks`.
        spatial_dims: axes of the image, as many as the block scans.
        depths, depths_up: blocks of each stage, from the top down and from the bottom up.
        width: channels at the top; twice as many in each stage below.
        states: numbers that each channel of a scan remembers.
        drop_path: of the deepest blocks; it falls linearly to 0.
        patch: side of the patches that become tokens.
        block_options: what the block takes beside these, such as ``{"window": 4}``.

    Raises: ValueError for an unknown block or option, with the nearest known one, and for sizes that make no network.
    """

    def __init__(
        self,
        in_channels: int = 1,
        out_channels: int = 2,
        *,
        block: str = "ss2d",
        spatial_dims: int = 2,
        depths: Sequence[int] = Shallow,
        depths_up: Sequence[int] = ShallowUp,
        width: int = 96,
        states: int = 16,
        drop_path: float = 0.2,
        patch: int = PATCH,
        block_options: Mapping[str, Any] | None = None,
    ) -> None:
        options = {**(block_options or {}), "spatial_dims": spatial_dims, "states": states}
        mix = partial(create_block, block, **options)
        sizes = {"spatial_dims": spatial_dims, "patch": patch}
        super().__init__(in_channels, out_channels, mix, depths, depths_up, width, drop_path, **sizes)
        self.block = block


def is_planar(name: str) -> bool:
    """Whether a name of this file stands for a network whose block scans planes only."""
    return name.partition(":")[2] in PLANAR


CARD = Card(
    family="State-space blocks",
    paper="2406.03430",
    code="https://github.com/xmindflow/Awesome_Mamba",
    license="",
    test="models/test_ssm_unet.py",
)
ENTRIES = [
    *(
        Entry(f"{PREFIX}:{name}", partial(SSMUNet, block=name), CARD(f"VM-UNet's U of {name} blocks."))
        for name in BLOCKS.names()
    ),
    Entry(
        "test_ssm_unet",
        partial(SSMUNet, block="s6", depths=(1, 1), depths_up=(1, 1), width=16, states=4),
        CARD("For tests."),
    ),
]
