"""VL-SAM: the flow's equation, point prompts, region growing, refinement, transformers' SAM."""

from typing import Any

import numpy as np
import pytest
import torch

from vlm_tools.readings.vl_sam import (
    HfSam,
    LayerRecord,
    RegionGrowing,
    dense_flow,
    flow_row,
    head_weights,
    largest_component,
    point_prompt,
    refined_masks,
)

pytestmark = pytest.mark.filterwarnings("ignore")


def test_row_of_the_flow_equals_the_dense_chain() -> None:
    torch.manual_seed(0)
    records = [LayerRecord(torch.randn(4, 20, 8), torch.randn(2, 20, 8), 8**-0.5) for _ in range(3)]
    maps = []
    for record in records:
        p = torch.cat([block for _, block in record.blocks()], dim=1)
        maps.append(torch.einsum("h,hbn->bn", head_weights(record) / 4, p))
    for row in (3, 19):
        torch.testing.assert_close(flow_row(records, row), dense_flow(maps)[row], atol=1e-5, rtol=0)
        plain = flow_row(records, row, regularized=False)
        torch.testing.assert_close(plain, dense_flow(maps, regularized=False)[row], atol=1e-5, rtol=0)
    with pytest.raises(ValueError, match="there is no layer"):
        flow_row([], 0)
    with pytest.raises(ValueError, match="tokens 0 … 19, got row=20"):
        flow_row(records, 20)


def test_planted_object_gets_the_positive_point() -> None:
    heat = torch.zeros(6, 8)
    heat[1:4, 4:7] = 1.0
    heat[5, 0] = 1.0
    found = point_prompt(heat)
    assert heat[found.positive[1], found.positive[0]] == 1
    assert found.region.sum() == 9
    assert not found.region[found.negative[1], found.negative[0]]
    with pytest.raises(ValueError, match="map is constant"):
        point_prompt(torch.ones(3, 3))
    tie = np.array([[1, 0, 1]], dtype=bool)
    assert largest_component(tie).tolist() == [[True, False, False]]


def test_region_growing_fills_the_object() -> None:
    image = np.zeros((9, 9), dtype=np.uint8)
    image[2:5, 3:7] = 200
    mask, _ = RegionGrowing().predict(image, torch.tensor([[4, 3], [0, 0]]), torch.tensor([1, 0]))
    assert mask.sum() == 12


def test_iteration_refines_within_the_mask_and_drops_doubles() -> None:
    image = np.zeros((9, 12), dtype=np.uint8)
    image[2:5, 3:7] = 200
    image[6:8, 9:11] = 200
    heat = torch.zeros(9, 12)
    heat[2:5, 3:7] = 0.8
    heat[3, 5] = 1.0
    masks = refined_masks(image, heat, RegionGrowing())
    assert len(masks) == 1
    assert masks[0][0].sum() == 12
    seen: list[tuple[list[list[int]], bool]] = []

    class Halves:
        def predict(self, image: Any, points: Any, labels: Any, mask: Any = None) -> tuple[Any, float]:  # noqa: ARG002  SAM calls it so
            seen.append((points.tolist(), mask is not None))
            out = np.zeros(image.shape, dtype=bool)
            out[:, :4] = True
            return out, 0.5

    refined_masks(image, heat, Halves())
    assert [with_mask for _, with_mask in seen] == [False, True, True]
    assert seen[0][0][0] == [5, 3]
    assert seen[2][0][0] == [3, 2]
    with pytest.raises(ValueError, match=r"heat is \(2, 2\), the picture \(9, 12\)"):
        refined_masks(image, torch.zeros(2, 2), RegionGrowing())
    with pytest.raises(ValueError, match="overlap must lie in"):
        refined_masks(image, heat, RegionGrowing(), overlap=2)


def test_sam_of_transformers_takes_points_and_masks() -> None:
    from transformers import SamConfig, SamImageProcessor, SamModel, SamProcessor

    vision = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2, "image_size": 64, "patch_size": 8,
              "output_channels": 8, "global_attn_indexes": [0], "window_size": 4, "mlp_dim": 16,
              "num_pos_feats": 4}  # fmt: skip
    prompt = {"hidden_size": 8, "image_size": 64, "patch_size": 8, "mask_input_channels": 4}
    decoder = {
        "hidden_size": 8,
        "mlp_dim": 16,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "iou_head_hidden_dim": 8,
    }
    torch.manual_seed(0)
    model = SamModel(SamConfig(vision_config=vision, prompt_encoder_config=prompt, mask_decoder_config=decoder)).eval()
    sizes: dict[str, Any] = {"size": {"longest_edge": 64}, "pad_size": {"height": 64, "width": 64}}
    sam = HfSam(
        model,
        SamProcessor(
            SamImageProcessor(**sizes, mask_size={"longest_edge": 32}, mask_pad_size={"height": 32, "width": 32})
        ),
    )
    image = np.random.default_rng(0).integers(0, 255, (40, 50, 3), dtype=np.uint8)
    points, labels = torch.tensor([[10, 12], [40, 30]]), torch.tensor([1, 0])
    mask, score = sam.predict(image, points, labels)
    assert mask.shape == (40, 50)
    again, other = sam.predict(image, points, labels, np.tri(40, 50, dtype=bool))
    assert again.shape == (40, 50)
    assert score != other


def test_a_flow_without_weights_takes_the_mean_of_the_heads() -> None:
    torch.manual_seed(0)
    record = LayerRecord(2 * torch.randn(4, 12, 8), torch.randn(2, 12, 8), 8**-0.5)
    mean = torch.cat([block for _, block in record.blocks()], dim=1).mean(0)
    torch.testing.assert_close(flow_row([record], 5, weighted=False), dense_flow([mean])[5], atol=1e-5, rtol=0)
    assert not torch.allclose(flow_row([record], 5), dense_flow([mean])[5], atol=1e-3)


def test_tolerance_is_how_far_gray_values_of_a_region_differ() -> None:
    image = np.tile(np.arange(0, 250, 25, dtype=np.uint8), (3, 1))  # columns 0, 25, … of 255
    point = torch.tensor([[0, 1]]), torch.tensor([1])
    sizes = [int(RegionGrowing(tolerance).predict(image, *point)[0].sum()) for tolerance in (0.05, 0.25, 0.5)]
    assert sizes == [3, 9, 18]
