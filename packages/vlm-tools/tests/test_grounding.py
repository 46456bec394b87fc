"""Points, flow, readings, pictures and pages: equations, controls, geometry, structure of the HTML."""

import base64
import json
from html.parser import HTMLParser
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from vlm_tools.adapters import adapter_of
from vlm_tools.explain import READINGS, explain, on_picture, with_answer
from vlm_tools.overlay import colored, overlay, strip
from vlm_tools.page import write_page
from vlm_tools.random_models import FAMILIES, random_inputs, random_model
from vlm_tools.read import similarity, similarity_points
from vlm_tools.vl_sam import (
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
        def predict(self, image: Any, points: Any, labels: Any, mask: Any = None) -> tuple[Any, float]:
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
    sizes = {"size": {"longest_edge": 64}, "pad_size": {"height": 64, "width": 64}}
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


def test_similarity_points_are_sorted_labelled_and_differentiable() -> None:
    torch.manual_seed(0)
    tokens = torch.randn(576, 8, requires_grad=True)
    scores = similarity(tokens, torch.ones(8))
    points, labels = similarity_points(scores, (200, 300), count=200)
    assert set(labels.tolist()) == {-1, 0, 1}
    order = [(1, 0, -1).index(int(label)) for label in labels]
    assert order == sorted(order)
    assert float(points[:, 0].max()) < 300
    points.sum().backward()
    assert float(tokens.grad.abs().sum()) > 0  # type: ignore[union-attr]
    whole, _ = similarity_points(scores.detach(), (200, 300), count=200, continuous=False)
    assert float((whole - points).abs().max()) < 1
    with pytest.raises(ValueError, match="scores are constant"):
        similarity_points(torch.ones(16), (8, 8))
    with pytest.raises(ValueError, match="square grid"):
        similarity_points(torch.rand(15), (8, 8))


@pytest.mark.parametrize("name", FAMILIES)
def test_every_image_token_has_a_place_in_the_picture(name: str) -> None:
    model, inputs = random_model(name), random_inputs(name)
    adapter = adapter_of(model)
    visual = inputs["input_ids"][0] == adapter.image_token_id(model.config)
    boxes = adapter.boxes(model.config, inputs, visual, (56, 56))
    assert boxes.shape == (int(visual.sum()), 4)
    painted = on_picture(torch.ones(len(boxes)), boxes, (56, 56))
    assert bool((painted == 1).all())


@pytest.mark.parametrize("reading", READINGS)
def test_reading_depends_on_the_image_and_the_control_does_not(reading: Any) -> None:
    torch.manual_seed(0)
    model = random_model("test_llava")
    maps = []
    for seed in (0, 1):
        inputs = random_inputs("test_llava")
        inputs["pixel_values"] = torch.randn(1, 3, 28, 28, generator=torch.Generator().manual_seed(seed))
        row = inputs["input_ids"].shape[1] - 1
        maps.append(explain(model, inputs, [row], [5], reading=reading)[0])
        assert maps[-1].shape == (16,)
        assert not torch.allclose(maps[-1], explain(model, inputs, [row], [5], reading=reading, control=True)[0])
    assert not torch.allclose(*maps)


def test_explain_refuses() -> None:
    model, inputs = random_model("test_llava"), random_inputs("test_llava")
    with pytest.raises(ValueError, match="reading must be one of attention"):
        explain(model, inputs, [0], reading="x")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="got rows=\\[99\\]"):
        explain(model, inputs, [99])
    with pytest.raises(ValueError, match="needs targets"):
        explain(model, inputs, [3], reading="chefer")
    with pytest.raises(ValueError, match="a batch of 2"):
        explain(model, random_inputs("test_llava", batch=2), [3])
    with pytest.raises(ValueError, match="as many boxes"):
        on_picture(torch.ones(2), torch.ones(3, 4), (4, 4))
    longer = with_answer(inputs, torch.tensor([[4, 5]]))
    assert longer["attention_mask"].shape == longer["input_ids"].shape == (1, inputs["input_ids"].shape[1] + 2)


def test_overlay_shows_map_bar_and_caption() -> None:
    heat = torch.zeros(20, 30)
    heat[5:10, 5:10] = 1
    picture = overlay(Image.new("RGB", (30, 20)), heat, "a cat")
    pixels = np.asarray(picture)
    assert picture.size[0] > 330
    assert pixels[7 * 12, 7 * 12].sum() > pixels[0, 0].sum()
    assert strip([picture] * 7, columns=3).size == (picture.size[0] * 3, picture.size[1] * 3)
    with pytest.raises(ValueError, match="picture is 3×3, the map 30×20"):
        overlay(Image.new("RGB", (3, 3)), heat, "")
    with pytest.raises(ValueError, match="opacity must lie"):
        overlay(Image.new("RGB", (30, 20)), heat, "", opacity=2)
    with pytest.raises(ValueError, match="limits must increase"):
        colored(heat, limits=(1, 0))
    with pytest.raises(ValueError, match="there is no picture"):
        strip([])


class _Tags(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.script = ""

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        if self.tags and self.tags[-1] == ("script", {"id": "data", "type": "application/json"}):
            self.script += data


def test_page_is_one_file_with_words_sliders_and_exact_maps() -> None:
    maps = torch.rand(3, 4, 2, 9, generator=torch.Generator().manual_seed(0))
    boxes = torch.rand(9, 4)
    boxes[8] = torch.nan
    page = write_page(Image.new("RGB", (30, 20)), "what </script> is?", ["a", "<b>", "cat"], maps, boxes)
    parsed = _Tags()
    parsed.feed(page)
    assert sum(attrs.get("class") == "word" for _, attrs in parsed.tags) == 3
    assert {attrs["id"]: attrs["max"] for tag, attrs in parsed.tags if tag == "input"} == {"layer": "3", "head": "1"}
    assert not any(str(value).startswith("http") for _, attrs in parsed.tags for value in attrs.values())
    assert "&lt;b&gt;" in page
    data = json.loads(parsed.script)
    stored = np.frombuffer(base64.b64decode(data["maps"]), dtype=np.uint8).reshape(data["shape"]) / 255
    restored = stored * np.array(data["scale"]).reshape(3, 4, 2, 1)
    assert np.abs(restored - maps.numpy()).max() < 1 / 255
    assert data["boxes"][8] is None
    with pytest.raises(ValueError, match="do not fit maps"):
        write_page(Image.new("RGB", (3, 2)), "", ["a"], maps, boxes)
    large = write_page(Image.new("RGB", (30, 20)), "", ["a"] * 40, torch.rand(40, 16, 32, 200), torch.rand(200, 4))
    assert len(large) < 2_000_000
