"""One HTML file that shows an answer: hover a word to see where it looks, choose layer and head; no network needed."""

import base64
import html
import io
import json
from collections.abc import Sequence

import numpy as np
from jaxtyping import Float
from PIL import Image
from torch import Tensor

LARGEST = 2_000_000  # bytes of the file

_PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><title>Where the answer looks</title><style>
body {{ font: 15px/1.5 system-ui, sans-serif; margin: 1.5rem; max-width: 1052px; color: #222 }}
#prompt, #words {{ overflow-wrap: anywhere }}
#view {{ position: relative; width: {width}px }}
#view img, #view canvas {{ width: {width}px; height: {height}px; image-rendering: pixelated; display: block }}
#view canvas {{ position: absolute; top: 0; left: 0; opacity: .65 }}
.word {{ padding: 1px 3px; border-radius: 3px; cursor: pointer }}
.word:hover, .word.chosen, .word:focus {{ background: #ffe066; outline: none }}
label {{ margin-right: 1.5rem }}
</style></head><body>
<h1>Where the answer looks</h1><p id="prompt">{prompt}</p>
<div id="view"><img alt="picture" src="data:image/png;base64,{picture}"><canvas id="heat"></canvas></div>
<p id="words">{words}</p>
<p><label>layer
<input id="layer" type="range" min="-1" max="{last_layer}" value="-1">
<output id="layer-name">mean</output>
</label><label>head
<input id="head" type="range" min="-1" max="{last_head}" value="-1">
<output id="head-name">mean</output>
</label></p>
<script id="data" type="application/json">{data}</script><script>
const data = JSON.parse(document.getElementById("data").textContent);
const bytes = Uint8Array.from(atob(data.maps), c => c.charCodeAt(0));
const [W, L, H, T] = data.shape, canvas = document.getElementById("heat"), context = canvas.getContext("2d");
canvas.width = {width}; canvas.height = {height};
let word = 0;
function draw() {{
  const layer = +document.getElementById("layer").value, head = +document.getElementById("head").value;
  document.getElementById("layer-name").value = layer < 0 ? "mean" : layer;
  document.getElementById("head-name").value = head < 0 ? "mean" : head;
  const heat = new Float32Array(T);
  for (let l = 0; l < L; l++) for (let h = 0; h < H; h++)
    if ((layer < 0 || layer === l) && (head < 0 || head === h))
      for (let t = 0; t < T; t++)
        heat[t] += bytes[((word * L + l) * H + h) * T + t] / 255 * data.scale[(word * L + l) * H + h];
  const most = Math.max(...heat, 1e-12);
  context.clearRect(0, 0, canvas.width, canvas.height);
  data.boxes.forEach((box, t) => {{
    if (!box) return;
    const v = heat[t] / most;
    context.fillStyle = `hsl(${{260 - 200 * v}} 90% ${{20 + 45 * v}}%)`;
    context.fillRect(box[0] * canvas.width, box[1] * canvas.height,
      (box[2] - box[0]) * canvas.width, (box[3] - box[1]) * canvas.height);
  }});
  document.querySelectorAll(".word").forEach((w, n) => w.classList.toggle("chosen", n === word));
}}
document.querySelectorAll(".word").forEach((w, n) => {{
  for (const event of ["mouseenter", "focus"]) w.addEventListener(event, () => {{ word = n; draw(); }});
}});
for (const id of ["layer", "head"]) document.getElementById(id).addEventListener("input", draw);
draw();
</script></body></html>
"""


def write_page(
    picture: Image.Image,
    prompt: str,
    words: Sequence[str],
    maps: Float[Tensor, "W L H T"],
    boxes: Float[Tensor, "T 4"],
) -> str:
    """The page as text, at most 2 MB: beyond that, heads are averaged, and beyond that, layers.

    Args:
        words: of the answer.
        maps: attention of each word on each image token, for each layer and head; not negative.
        boxes: of the image tokens, fractions of the picture; NaN for tokens that show none.

    Raises:
        ValueError: numbers of words, tokens and maps do not fit, or a word has no map even so.
    """
    if maps.shape[0] != len(words) or maps.shape[3] != len(boxes):
        raise ValueError(f"write_page: {len(words)} words and {len(boxes)} boxes do not fit maps {tuple(maps.shape)}")
    stored = io.BytesIO()
    shown = picture.convert("RGB")
    shown.thumbnail((768, 768))
    shown.save(stored, format="PNG")
    for reduced in (maps, maps.mean(2, keepdim=True), maps.mean((1, 2), keepdim=True)):
        if stored.tell() * 4 / 3 + reduced.numel() * 4 / 3 + 14 * reduced[..., 0].numel() + 40_000 < LARGEST:
            maps = reduced
            break
    else:
        raise ValueError(
            f"write_page: {len(words)} words with {len(boxes)} image tokens make more than {LARGEST:,} bytes"
        )
    scale = maps.amax(-1)
    quantized = (maps / scale.clamp_min(1e-12)[..., None] * 255).round().cpu().numpy().astype(np.uint8)
    times = max(1, 420 // max(shown.size))
    data = {
        "shape": list(maps.shape),
        "scale": [float(f"{value:.4g}") for value in scale.flatten().tolist()],
        "boxes": [None if box[0] != box[0] else [round(v, 4) for v in box] for box in boxes.tolist()],
        "maps": base64.b64encode(quantized.tobytes()).decode(),
    }
    return _PAGE.format(
        prompt=html.escape(prompt),
        words=" ".join(f'<span class="word" tabindex="0">{html.escape(word)}</span>' for word in words),
        picture=base64.b64encode(stored.getvalue()).decode(),
        width=shown.size[0] * times,
        height=shown.size[1] * times,
        last_layer=maps.shape[1] - 1,
        last_head=maps.shape[2] - 1,
        data=json.dumps(data).replace("</", "<\\/"),
    )
