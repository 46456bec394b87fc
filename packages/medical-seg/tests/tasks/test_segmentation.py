"""What the engine trains."""

import pytest

from medical_seg.tasks.segmentation import SegmentationTask


def test_regions_and_their_labels_must_match_the_network() -> None:
    with pytest.raises(ValueError, match=r"SegmentationTask: 2 regions, 1 labels .* out_channels=2 must be equal"):
        SegmentationTask("test_agunet", (8, 8, 8), regions=[[1, 2], [2]], order=[1])
