"""Deletion and insertion hide what they say, pointing hits where the peak lies; tables; refusals."""

import json
from typing import Any

import pytest
import torch

from vlm_tools.agreement.compare import RANDOM, areas, compare, mean_areas
from vlm_tools.agreement.faithfulness import Curves, curves, pointing_game
from vlm_tools.testing.random_models import IMAGE, random_inputs, random_model

pytestmark = pytest.mark.filterwarnings("ignore")  # transformers' own deprecations


@pytest.fixture(scope="module")
def model() -> Any:
    torch.manual_seed(0)
    return random_model("test_llava")


def test_curves_hide_the_most_relevant_first_and_bring_them_back_first(model: Any) -> None:
    inputs, heat = random_inputs("test_llava"), torch.randn(16)
    row = inputs["input_ids"].shape[1] - 1
    found = curves(model, inputs, row, 5, heat, steps=4)
    assert found.share.tolist() == [0, 0.25, 0.5, 0.75, 1]
    # What comes back in one order has left in the opposite one.
    torch.testing.assert_close(found.insertion, curves(model, inputs, row, 5, -heat, steps=4).deletion.flip(0))
    # One point by hand: the decoder on embeddings in which the four most relevant are the mean of all.
    with torch.no_grad():
        embeds = model.get_input_embeddings()(inputs["input_ids"])
        visual = inputs["input_ids"][0] == IMAGE
        seen = model.model.get_image_features(inputs["pixel_values"], return_dict=True).pooler_output
        embeds[0, visual] = torch.cat(list(seen)).view(16, -1)
        whole = model(inputs_embeds=embeds, attention_mask=inputs["attention_mask"]).logits[0, row].softmax(-1)[5]
        hidden = visual.nonzero().flatten()[heat.topk(4).indices]
        embeds[0, hidden] = embeds[0, visual].mean(0)
        part = model(inputs_embeds=embeds, attention_mask=inputs["attention_mask"]).logits[0, row].softmax(-1)[5]
    assert float(found.deletion[0]) == pytest.approx(float(whole), abs=1e-6)
    assert float(found.deletion[1]) == pytest.approx(float(part), abs=1e-6)
    assert float((found.deletion[0] - found.deletion[1]).abs()) > 1e-5


def test_areas_are_those_of_trapezoids_and_a_random_order_stands_beside_them(model: Any) -> None:
    drawn = Curves(torch.tensor([0.0, 0.5, 1.0]), torch.tensor([1.0, 0.0, 0.0]), torch.tensor([0.0, 1.0, 1.0]))
    assert (drawn.deletion_area, drawn.insertion_area) == (0.25, 0.75)
    inputs, heat = random_inputs("test_llava"), torch.randn(16)
    row = inputs["input_ids"].shape[1] - 1
    found = areas(model, inputs, row, 5, {"own": heat}, steps=2)
    own = curves(model, inputs, row, 5, heat, steps=2)
    assert list(found) == ["own", RANDOM]
    assert found["own"] == (own.deletion_area, own.insertion_area)
    assert found[RANDOM] != areas(model, inputs, row, 5, {"own": heat}, steps=2, seed=1)[RANDOM]
    assert mean_areas([{"own": (0.0, 1.0)}, {"own": (1.0, 0.5)}]) == {"own": (0.5, 0.75)}
    with pytest.raises(ValueError, match=r"^mean_areas: there is no row"):
        mean_areas([])


def test_pointing_counts_the_peak_and_shares_ties() -> None:
    heat = torch.tensor([[0.1, 0.9, 0.2], [0.5, 0.5, 0.1], [0.0, 0.0, 0.0]])
    truth = torch.tensor([[False, True, False], [True, False, False], [True, False, False]])
    assert pointing_game(heat, truth).tolist() == pytest.approx([1.0, 0.5, 1 / 3])
    with pytest.raises(ValueError, match=r"^pointing_game: heat and truth must have one shape and truth be bool"):
        pointing_game(heat, truth.float())  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"^pointing_game: the map holds NaN"):
        pointing_game(heat / 0, truth)


def test_a_comparison_names_agreement_chance_and_hits() -> None:
    torch.manual_seed(0)
    truth = torch.eye(6, dtype=torch.bool)
    right = truth + 0.1 * torch.rand(6, 6)
    maps = {"right": right, "alike": right + 0.01 * torch.rand(6, 6), "wrong": -right}
    found = compare(maps, k=3, permutations=20, truth=truth)
    assert found.hits == {"right": 1.0, "alike": 1.0, "wrong": 0.0, "chance": pytest.approx(1 / 6)}
    assert found.pairs["kendall"]["right", "alike"].p < 0.05
    assert found.pairs["kendall"]["right", "wrong"].observed == pytest.approx(-1.0)
    assert found.pairs["top_k"] != compare(maps, k=1, permutations=20).pairs["top_k"]
    text = "\n".join(found.lines())
    assert "*" in text
    assert "-1.00" in text
    assert "pointing game" in text
    assert "areas" not in text
    found.areas = {"right": (0.1, 0.9)}
    assert "0.100  0.900" in "\n".join(found.lines())
    assert json.loads(json.dumps(found.row()))["hits"]["right"] == 1.0
    with pytest.raises(ValueError, match=r"^compare: agreement needs two maps or more, got 1"):
        compare({"right": right})


def test_maps_that_do_not_fit_the_prompt_are_refused(model: Any) -> None:
    inputs = random_inputs("test_llava")
    with pytest.raises(ValueError, match=r"^curves: the prompt has 16 image tokens, the map has the shape \(9,\)"):
        curves(model, inputs, 3, 5, torch.ones(9))
    with pytest.raises(ValueError, match=r"^curves: steps must be at least 1, got steps=0"):
        curves(model, inputs, 3, 5, torch.ones(16), steps=0)
    with pytest.raises(ValueError, match=r"^curves: the map holds NaN"):
        curves(model, inputs, 3, 5, torch.full((16,), torch.nan))
