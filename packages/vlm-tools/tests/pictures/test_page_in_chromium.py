"""The page of an explanation in headless Chromium: words and sliders draw the maps they stand for."""

import colorsys
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from vlm_tools.pictures.page import write_page

SCRIPT = """
(() => {
  const canvas = document.getElementById("heat"), context = canvas.getContext("2d");
  const words = [...document.querySelectorAll(".word")], drawn = [];
  const draw = () => drawn.push(data.boxes.filter(box => box).map(box => [...context.getImageData(
    (box[0] + box[2]) / 2 * canvas.width, (box[1] + box[3]) / 2 * canvas.height, 1, 1).data].slice(0, 3)));
  const slide = (id, value) => {
    document.getElementById(id).value = value;
    document.getElementById(id).dispatchEvent(new Event("input"));
  };
  draw();
  words[1].dispatchEvent(new Event("mouseenter")); draw();
  slide("layer", 1); draw();
  slide("head", 0); draw();
  words[0].dispatchEvent(new Event("focus")); slide("layer", -1); draw();
  return JSON.stringify({
    drawn, chosen: words.map(word => word.classList.contains("chosen")), text: words.map(word => word.textContent),
    names: ["layer-name", "head-name"].map(id => document.getElementById(id).value),
    requests: performance.getEntriesByType("resource").filter(entry => !entry.name.startsWith("data:")).length,
    picture: document.querySelector("#view img").naturalWidth,
  });
})()
"""


def colors(heat: Tensor) -> np.ndarray:
    """What the page paints: hsl(260 − 200v, 90 %, 20 + 45v %), v being 1 at the brightest token."""
    shares = (heat / heat.max()).tolist()
    painted = [colorsys.hls_to_rgb((260 - 200 * v) / 360, (20 + 45 * v) / 100, 0.9) for v in shares]
    return 255 * np.array(painted)


@pytest.mark.browser
def test_words_and_sliders_draw_the_maps_they_stand_for(tmp_path: Path) -> None:
    maps = torch.rand(2, 3, 2, 6, generator=torch.Generator().manual_seed(0))
    boxes = torch.tensor([[x / 3, y / 2, (x + 1) / 3, (y + 1) / 2] for y in range(2) for x in range(3)])
    boxes[5], maps[..., 5] = torch.nan, 0.0  # a token that shows no part of the picture
    page, script = tmp_path / "page.html", tmp_path / "script.js"
    page.write_text(write_page(Image.new("RGB", (30, 20)), "what is?", ["a", "<b>"], maps, boxes), encoding="utf-8")
    script.write_text(SCRIPT, encoding="utf-8")
    command = [sys.executable, str(Path(__file__).with_name("chromium.py")), str(page), str(script)]
    done = subprocess.run(command, capture_output=True, encoding="utf-8", check=True, timeout=120)
    seen = json.loads(done.stdout)
    expected = [maps[0].sum((0, 1)), maps[1].sum((0, 1)), maps[1, 1].sum(0), maps[1, 1, 0], maps[0, :, 0].sum(0)]
    for drawn, heat in zip(seen["drawn"], expected, strict=True):
        assert np.abs(np.array(drawn) - colors(heat[:5])).max() <= 4  # maps are stored in 255 steps
    assert seen["chosen"] == [True, False]
    assert seen["text"] == ["a", "<b>"]
    assert seen["names"] == ["mean", "0"]
    assert seen["requests"] == 0
    assert seen["picture"] == 30
