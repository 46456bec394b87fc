"""AGLA: relevance maps, masked views, its scores."""

import math
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from scipy import ndimage
from torch import Tensor
from transformers import BlipConfig, BlipForImageTextRetrieval

from vlm_tools import AGLA, intervene
from vlm_tools.methods.agla import assemble, blip_relevance, keep_salient, keep_share, masked_view, smooth_map
from vlm_tools.testing.random_models import random_inputs, random_model

pytestmark = pytest.mark.filterwarnings("ignore")


def test_assembled_scores_equal_their_formula() -> None:
    z, other = torch.tensor([[2.0, 1.0, 0.5]]), torch.tensor([[0.5, 2.0, 0.0]])
    assert assemble(z, other, 2.0, 0.3).tolist() == [[3.0, 5.0, -math.inf]]  # cut: 2 + log 0.3 = 0.8


def test_relevance_is_enlarged_and_blurred_as_by_scipy() -> None:
    relevance = np.random.default_rng(0).random((24, 24))
    unit = (relevance - relevance.min()) / (relevance.max() - relevance.min())
    large: Any = ndimage.zoom(unit, 16, order=3, mode="grid-constant", grid_mode=True)
    large = np.clip(large, 0, 1)
    want = ndimage.gaussian_filter(large, 7.68, mode="reflect")
    want = (want - want.min()) / (want.max() - want.min())
    assert np.abs(smooth_map(torch.from_numpy(relevance)) - want).max() < 1e-6


def test_a_better_match_keeps_fewer_pixels() -> None:
    picture = Image.new("RGB", (90, 60), "white")
    relevance = torch.rand(24, 24, generator=torch.Generator().manual_seed(0))
    shares = [(np.asarray(masked_view(picture, relevance, c)) > 0).mean() for c in (0.0, 0.4, 0.8)]
    assert shares == sorted(shares, reverse=True)
    assert shares[2] == pytest.approx(0.6, abs=0.02)
    assert keep_share(-1.0) == 1 - 1e-5
    assert float((keep_salient(torch.randn(2, 3, 20, 20), 0.6) != 0).float().mean()) == pytest.approx(0.6, abs=0.01)


def test_the_share_of_pixels_is_kept_in_each_tile_and_of_each_list_of_patches() -> None:
    tiles = torch.randn(2, 3, 3, 10, 10)
    shares = (keep_salient(tiles, 0.3) != 0).float().mean((2, 3, 4))
    assert float((shares - 0.3).abs().max()) < 0.02
    patches = torch.cat([torch.randn(40, 12), 3 * torch.randn(20, 12)])
    kept = keep_salient(patches, 0.5, rows=[40, 20]).abs().sum(1) > 0
    assert [int(part.sum()) for part in kept.split([40, 20])] == [20, 10]
    assert int((keep_salient(patches, 0.0) != 0).sum()) == 0


def test_scores_of_a_step_equal_their_formula_over_the_masked_pixels(setting: Any) -> None:
    x = setting.inputs["pixel_values"]
    size = x.abs().flatten()
    masked = torch.where(x.abs() >= size.sort().values[math.ceil(0.4 * (len(size) - 1))], x, 0.0)
    with torch.no_grad():
        z, other = (setting.model(**{**setting.inputs, "pixel_values": pixels}).logits[:, -1] for pixels in (x, masked))
    want = (z + 2 * other).masked_fill(z < z.max() + math.log(0.8), -torch.inf).log_softmax(-1)
    with intervene(setting.model, AGLA(alpha=2.0, plausibility=0.8, keep=0.6)):
        out = setting.model.generate(
            **setting.inputs, max_new_tokens=1, do_sample=False, return_dict_in_generate=True, output_scores=True
        )
    assert 1 < int(want.isfinite().sum()) < want.numel()
    torch.testing.assert_close(out.scores[0].double(), want, atol=1e-5, rtol=0)


def test_relevance_is_attention_times_its_positive_gradient_and_the_cosine_that_of_both_towers() -> None:
    """The gradient by differences: one weight of the cross-attention moved at a time."""
    torch.manual_seed(0)
    size: dict[str, Any] = {"hidden_size": 16, "num_attention_heads": 2, "intermediate_size": 16}
    words = {"vocab_size": 40, "bos_token_id": 38, "sep_token_id": 2, "max_position_embeddings": 16}
    config = BlipConfig(
        text_config={**size, **words, "encoder_hidden_size": 16, "num_hidden_layers": 2},
        vision_config={**size, "image_size": 32, "patch_size": 16, "num_hidden_layers": 2},
        image_text_hidden_size=8,
    )
    blip: Any = BlipForImageTextRetrieval(config).double().eval()
    for parameter in blip.parameters():
        torch.nn.init.normal_(parameter, std=0.4)
    pixels, ids = torch.randn(1, 3, 32, 32, dtype=torch.float64), torch.tensor([[3, 5, 8, 11, 2]])
    relevance, cosine = blip_relevance(blip, pixels, ids, layer=0, encode_token=39)
    cross = blip.text_encoder.encoder.layer[0].crossattention.self
    kept: dict[str, Tensor] = {}

    def moved(_module: Any, _inputs: Any, output: Any) -> Any:
        kept.setdefault("maps", output[1].detach())
        values = cross.value(kept["image"]).view(1, -1, 2, 8).transpose(1, 2)
        context = ((kept["maps"] + kept["step"]) @ values).transpose(1, 2).flatten(2)
        return (context, *output[1:])

    matching = torch.tensor([[39, 5, 8, 11, 2]])
    with torch.no_grad():
        kept["image"] = blip.vision_model(pixels).last_hidden_state
        handle = cross.register_forward_hook(moved)
        expected = torch.zeros(4, dtype=torch.float64)
        kept["step"] = torch.zeros(1, 2, 5, 5, dtype=torch.float64)
        blip(input_ids=matching, pixel_values=pixels)
        for head, token, patch in np.ndindex(2, 3, 4):  # neither first nor last token, no class token
            scores = []
            for step in (1e-4, -1e-4):
                kept["step"] = torch.zeros(1, 2, 5, 5, dtype=torch.float64)
                kept["step"][0, head, token + 1, patch + 1] = step
                scores.append(float(blip(input_ids=matching, pixel_values=pixels)[0][0, 1]))
            slope = max(0.0, (scores[0] - scores[1]) / 2e-4)
            expected[patch] += float(kept["maps"][0, head, token + 1, patch + 1]) * slope / 6
        handle.remove()
        text = blip.text_encoder(ids).last_hidden_state[:, 0]
        a, b = blip.vision_proj(kept["image"][:, 0]), blip.text_proj(text)
    assert float(expected.max()) > 0
    torch.testing.assert_close(relevance.flatten(), expected, rtol=1e-5, atol=1e-9)
    assert relevance.shape == (2, 2)
    assert not relevance.requires_grad
    assert cosine == pytest.approx(float((a * b).sum() / a.norm() / b.norm()))


def test_refusals() -> None:
    with pytest.raises(ValueError, match="AGLA: plausibility"):
        AGLA(plausibility=2)
    with pytest.raises(ValueError, match="AGLA: keep must lie"):
        AGLA(keep=2)
    model, inputs = random_model("test_llava"), random_inputs("test_llava")
    with intervene(model, AGLA(torch.zeros(1, 3, 4, 4))), pytest.raises(ValueError, match="view has shape"):
        model.generate(**inputs, max_new_tokens=1)  # pyright: ignore[reportCallIssue]
