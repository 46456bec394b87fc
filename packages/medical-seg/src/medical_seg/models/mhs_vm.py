"""MHS-VM: VM-UNet whose blocks scan in several heads, each along routes of its own, and fuse routes by their variation.

Paper: Ji, MHS-VM: Multi-Head Scanning in Parallel Subspaces for Vision Mamba, arXiv 2406.05992.
Official code: https://github.com/PixDeep/MHS-VM (Apache-2.0), models/vmunet/mhsm.py, vmamba.py, vmunet.py and
scanutils.py.

Same: every layer and name, the orders of all routes, the fusion (no learned weights), start values.
Differs: routes of any grid (officially tables of 256² from a file); all heads are scanned in one call; the fusion's
threshold stands in the checkpoint (officially in the settings, and the test script takes another); otherwise as VM-
UNet. Parameters that official checkpoints hold twice are read once.
Checked: tests/models/test_mhs_vm.py, against a plain network with a loop over tokens; names by a round trip.

Shapes: (B, C, Y, X) with Y and X divisible by 32 → (B, K, Y, X) logits.
"""

from collections.abc import Sequence
from functools import partial

from attn_core.catalog import Card, Entry
from medical_seg.layers.state_space.multi_head import GatedScan
from medical_seg.models.vm_unet import Deep, DeepUp, Shallow, ShallowUp, StateSpaceUNet


class MHSVM(StateSpaceUNet):
    """Blocks scan in heads.

    Args:
        in_channels: C.
        out_channels: K, the number of classes with the background; 1 for logits of a foreground.
        heads: 3 or 4.
        threshold: of the fusion: 0.5 for ISIC 2018 and 0 for ISIC 2017 in the authors' settings, 0.4 in their test
            script. A loaded checkpoint of ours brings its own.
        depths, depths_up: blocks of each stage, from the top down and from the bottom up.
        width: channels at the top; twice as many in each stage below.
        states: numbers that each channel of a scan remembers.
        drop_path: of the deepest blocks; it falls linearly to 0.

    Raises: ValueError for another number of heads.
    """

    def __init__(
        self,
        in_channels: int = 3,
        out_channels: int = 1,
        *,
        heads: int = 4,
        threshold: float = 0.5,
        depths: Sequence[int] = Shallow,
        depths_up: Sequence[int] = ShallowUp,
        width: int = 96,
        states: int = 16,
        drop_path: float = 0.2,
    ) -> None:
        if heads not in (3, 4):
            raise ValueError(f"MHSVM: heads must be 3 or 4, got heads={heads}")
        mix = partial(GatedScan, heads=heads, states=states, threshold=threshold)
        super().__init__(in_channels, out_channels, mix, depths, depths_up, width, drop_path)


CARD = Card(
    family="MHS-VM",
    paper="2406.05992",
    code="https://github.com/PixDeep/MHS-VM",
    license="Apache-2.0",
    test="models/test_mhs_vm.py",
)
ENTRIES = [
    Entry("mhs_vm", MHSVM, CARD("Four heads, eight and seven blocks, 2-D.", "DSC 89.4 % (ISIC 2018)")),
    Entry("mhs_vm_3h", partial(MHSVM, heads=3), CARD("Three heads, eight and seven blocks, 2-D.")),
    Entry(
        "mhs_vm_deep",
        partial(MHSVM, depths=Deep, depths_up=DeepUp),
        CARD("Four heads, fifteen and fifteen blocks, 2-D."),
    ),
    Entry(
        "mhs_vm_3h_deep",
        partial(MHSVM, heads=3, depths=Deep, depths_up=DeepUp),
        CARD("Three heads, fifteen and fifteen blocks, 2-D."),
    ),
    Entry(
        "test_mhs_vm",
        partial(MHSVM, depths=(1, 1), depths_up=(1, 1), width=16, states=4, threshold=0.0),
        CARD("For tests."),
    ),
]
