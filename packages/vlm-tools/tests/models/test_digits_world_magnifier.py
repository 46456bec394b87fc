"""The digits-world magnifier: its tokens by loops over pixels, what each form sees, its size, its options; refusals."""

import contextlib
import math
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from vlm_tools import create_model
from vlm_tools.data.cell_questions import CellQuestions
from vlm_tools.data.digits_world import scene
from vlm_tools.models import digits_world_magnifier
from vlm_tools.models.digits_world_magnifier import DigitsWorldMagnifier
from vlm_tools.models.scene_magnifier import magnified


def _gelu(x: Tensor) -> Tensor:
    return torch.stack([v * 0.5 * (1 + math.erf(v / math.sqrt(2))) for v in x])


@pytest.mark.parametrize("magnify", [True, False])
def test_tokens_are_those_of_loops_over_cells_and_the_last_one_answers(
    magnify: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.manual_seed(0)
    net = DigitsWorldMagnifier(magnify=magnify, width=16, layers=3, per_token=3, warm_up=None).double().eval()
    image, cell = torch.rand(2, 1, 36, 36, dtype=torch.float64), torch.tensor([5, 14])
    seen: dict[str, Any] = {}

    @contextlib.contextmanager
    def kept(model: Any, magnifier: Any, dense: Tensor, scene: Tensor) -> Iterator[None]:
        seen.update(dense=dense, scene=scene)
        with magnified(model, magnifier, dense, scene):
            yield

    monkeypatch.setattr(digits_world_magnifier, "magnified", kept)
    net.decoder.register_forward_pre_hook(lambda _m, _a, given: seen.update(given), with_kwargs=True)
    net.decoder.register_forward_hook(lambda _m, _a, out: seen.update(last=out.last_hidden_state[:, -1]))
    with torch.no_grad():
        logits = net(image, cell)
        for row in range(2):
            for place in range(16):
                top, left = 9 * (place // 4), 9 * (place % 4)
                pixels = torch.stack([image[row, 0, top + y, left + x] for y in range(9) for x in range(9)])
                means = torch.stack([
                    image[row, 0, top + 3 * y : top + 3 * y + 3, left + 3 * x : left + 3 * x + 3].mean()
                    for y in range(3) for x in range(3)
                ])  # fmt: skip
                coarse = net.coarse.weight @ means + net.coarse.bias + net.cells.weight[place]
                torch.testing.assert_close(seen["inputs_embeds"][row, place], coarse)
                if magnify:
                    first, last = net.dense[0], net.dense[2]
                    dense = last.weight @ _gelu(first.weight @ pixels + first.bias) + last.bias  # type: ignore[operator]
                    torch.testing.assert_close(seen["dense"][row, place], dense.view(3, 16))
            torch.testing.assert_close(seen["inputs_embeds"][row, 16], net.asked.weight[cell[row]])
        torch.testing.assert_close(logits, seen["last"] @ net.head.weight.T + net.head.bias)
    assert ("dense" in seen) == magnify
    if magnify:
        assert seen["scene"].tolist() == [[True] * 16 + [False]] * 2


def test_without_the_magnifier_equal_averages_give_equal_logits_and_with_it_they_do_not() -> None:
    image = torch.rand(1, 1, 36, 36)
    moved = image.clone()
    moved[..., 0, 0], moved[..., 1, 1] = image[..., 1, 1], image[..., 0, 0]
    cell = torch.tensor([0])
    for magnify in (False, True):
        torch.manual_seed(0)
        net: Any = create_model("digits_world_magnifier", magnify=magnify, threshold=0.0).eval()
        same = torch.allclose(net(image, cell), net(moved, cell), atol=1e-6)
        assert same == (not magnify)
        assert net.decoder.config._attn_implementation == "sdpa"


def test_sizes_follow_the_options() -> None:
    count = {
        magnify: sum(p.numel() for p in DigitsWorldMagnifier(magnify=magnify).parameters()) for magnify in (False, True)
    }
    assert count == {True: 203_146, False: 151_434}
    net = DigitsWorldMagnifier(width=16, layers=3, per_token=2, start=0, threshold=0.5, warm_up=None)
    assert net.magnifier is not None
    assert sorted(net.magnifier.keys) == ["1", "2"]
    assert (net.magnifier.threshold, net.magnifier.warm_up) == (0.5, None)
    assert net.dense[2].out_features == 2 * 16


def test_questions_are_about_occupied_cells_and_the_same_on_every_machine() -> None:
    data = CellQuestions("test", 20, start=3)
    for number in range(len(data)):
        one = data[number]
        assert one["image"].shape == (1, 36, 36)
        assert one["digit"] == scene("test", 3 + number).cells[one["cell"]] < 10
    with pytest.raises(ValueError, match=r"^CellQuestions: count must be at least 1 .* got count=0, start=0"):
        CellQuestions("test", 0)


def test_refusals() -> None:
    with pytest.raises(
        ValueError, match=r"^DigitsWorldMagnifier: width must be a multiple of 8 .* width=12, per_token=4"
    ):
        DigitsWorldMagnifier(width=12)
    with pytest.raises(
        ValueError, match=r"^DigitsWorldMagnifier: image must be \(B, 1, 36, 36\), got \(1, 1, 35, 36\)"
    ):
        DigitsWorldMagnifier(width=8, layers=3)(torch.rand(1, 1, 35, 36), torch.tensor([0]))
