"""The page of an explanation: one file, its words, sliders and maps."""

import base64
import json
from html.parser import HTMLParser

import numpy as np
import pytest
import torch
from PIL import Image

from vlm_tools.pictures.page import write_page


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
