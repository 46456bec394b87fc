"""A random LLaVA in float64, its prompt, and logits of greedy tokens under a method or under edited dense maps."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from vlm_tools import Method, intervene
from vlm_tools.testing.dense_attention import Edit, edited_maps
from vlm_tools.testing.random_models import random_inputs, random_model


class Setting:
    """One model and one prompt; ``visual`` (T,) is True at its image tokens."""

    def __init__(self) -> None:
        torch.manual_seed(0)
        self.model: Any = random_model("test_llava").double()
        self.inputs = random_inputs("test_llava", words=9)
        self.inputs["pixel_values"] = self.inputs["pixel_values"].double()
        self.visual = self.inputs["input_ids"][0] == self.model.config.image_token_id

    def visual_of(self, keys: int) -> Tensor:
        """(M,) True at image tokens, with the tokens of the answer."""
        return torch.nn.functional.pad(self.visual, (0, keys - len(self.visual)))

    def logits(self) -> Tensor:
        """(4, V) logits of the first tokens of a greedy answer, of the prompt and then one by one with a cache."""
        out = self.model.generate(
            **self.inputs, max_new_tokens=4, do_sample=False, return_dict_in_generate=True, output_logits=True
        )
        return torch.cat(out.logits)

    def under(self, method: Method) -> Tensor:
        """Logits under a method."""
        with intervene(self.model, method):
            return self.logits()

    def dense(self, edit: Edit) -> Tensor:
        """Logits with edited dense maps."""
        with edited_maps(self.model, edit):
            return self.logits()


@pytest.fixture(scope="module")
def setting() -> Setting:
    """See `Setting`."""
    return Setting()


@pytest.fixture
def check_dense(setting: Setting) -> Callable[..., None]:
    """Compares a method with its dense formulation, and sees that it changes the model.

    With ``rows``, the (row, head) pairs that each layer edits, the mass that the last rows move is compared too.
    """

    def check(method: Method, edit: Edit, *, rows: int | None = None) -> None:
        moved: dict[int, list[float]] = {}

        def watched(scores: Tensor, layer: int, hidden: Tensor) -> Tensor:
            p = edit(scores, layer, hidden)
            gained = (p - scores.softmax(-1))[0, :, -1].clamp_min(0).sum(-1)
            moved.setdefault(layer, []).append(float(gained.mean()))
            return p

        want = setting.dense(watched)
        with intervene(setting.model, method) as run:
            torch.testing.assert_close(setting.logits(), want, atol=1e-8, rtol=0)
        plain = setting.dense(lambda scores, _layer, _hidden: scores.softmax(-1))
        assert float((plain - want).abs().max()) > 1e-3
        if rows is not None:
            edited = {row["layer"]: row["mass_moved"] for row in run.report() if row["edited"]}
            assert edited == pytest.approx({n: sum(found) / len(found) for n, found in moved.items() if n in edited})
            assert all(row["edited"] in (0, rows) for row in run.report())

    return check
