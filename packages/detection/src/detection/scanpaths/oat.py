"""OAT: the order in which objects of a shelf are looked at, by someone who searches one of them.

Paper: Fang, Yu, Zhang, van der Lans, Shi, OAT: Object-Level Attention Transformer for Gaze Scanpath Prediction, ECCV
2024, arXiv 2407.13335. Official: https://github.com/HKUST-NISL/oat_eccv24, ``src/model/models.py`` and
``transformerLightning.py`` (no licence named: written here from what they compute).

Same: 18,300,985 parameters at 84 objects; crops through two convolutions, positions out of a fixed table, torch's
transformer with norms behind the residuals, and two heads that score each object by the product of projected decoder
and encoder tokens. The token of the target is scored like an object and means that the search ENDs; a last class, whose
score is 0 before the readout, is padding. ``generator`` and ``position_linear`` hold numbers that the published
configuration never uses; they are kept, without gradients, so that checkpoints fit both ways.

Different: batches come first; the crop of a fixated object is embedded once and not again for the decoder; the table of
positions has a closed form (see `position_table`) instead of 10,000 steps of Adam. Official crops are OpenCV's, blue
first, of book covers 0 … 255 and of the others 0 … 1; the crop of the start is 1 everywhere in either scale.

Numbers are checked in ``tests/scanpaths/test_oat.py`` against a plain network. Crops (B, P, 3, Y, X), target (B,),
paths (B, T) → scores (B, T + 1, P + 2).
"""

import math
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional as F

from attn_core import weights
from attn_core.catalog import Card, Entry
from detection.scanpaths.searchers import PAD, Seen, grid_cells

Readout = Literal["objects", "classes"]
PYRAMIDS = (0, 2, 3, 4)
NORM = 8.764  # of each row of the table that the authors fitted for 6 × 14 objects
JITTER = 1e-9  # keeps the Gram matrix of a wide kernel positive definite


def position_table(rows: int, width: int, *, sigma: float = 2.0, norm: float = NORM) -> Float[Tensor, "R W"]:
    """Vectors of equal length whose cosines are exp(−(i − j)²/(2σ²)): what the authors fit, in closed form.

    The Cholesky factor of that Gram matrix, filled up with zeros; all tables with these cosines are turned copies of
    one.

    Raises: ValueError for fewer columns than rows, which cannot hold the cosines, or a kernel too wide to factor.
    """
    if not 1 <= rows <= width:
        raise ValueError(f"position_table: rows must be 1…{width}, the width, got rows={rows}; use a larger dim")
    if not 0 < sigma <= 4:
        raise ValueError(f"position_table: sigma must be in (0, 4] rows, got sigma={sigma}")
    steps = torch.arange(rows, dtype=torch.float64)
    gram = torch.exp(-((steps[:, None] - steps) ** 2) / (2 * sigma**2))
    factor = torch.linalg.cholesky(gram + JITTER * torch.eye(rows, dtype=torch.float64))
    return (norm * F.pad(factor, (0, width - rows))).float()


def steps_table(steps: int, dim: int, like: Tensor) -> Float[Tensor, "T C"]:
    """Sines and cosines of the step, in turn."""
    rates = torch.exp(torch.arange(0, dim, 2, device=like.device) * (-math.log(10000) / dim))
    angles = torch.arange(steps, device=like.device)[:, None] * rates
    return torch.stack([angles.sin(), angles.cos()], -1).flatten(1).to(like.dtype)


class CropEmbedding(nn.Module):
    """Crops → vectors: two convolutions, then pooling to a grid or to a pyramid. (N, 3, Y, X) → (N, dim)."""

    def __init__(self, dim: int, crop_size: tuple[int, int], pyramid: int) -> None:
        super().__init__()
        self.pyramid = pyramid
        self.conv1 = nn.Conv2d(3, 16, 5)
        self.conv2 = nn.Conv2d(16, 32, 3)
        cells = [((side - 4) // 5 - 2) // (1 if pyramid else 3) for side in crop_size]
        if min(cells) < 1:
            least = 19 if pyramid else 29
            raise ValueError(f"OAT: crop_size must be at least {least}×{least}, got crop_size={tuple(crop_size)}")
        places = sum(4**level for level in range(pyramid)) if pyramid else cells[0] * cells[1]
        self.linear = nn.Linear(32 * places, dim)

    def forward(self, crops: Float[Tensor, "N 3 Y X"]) -> Float[Tensor, "N C"]:
        """One vector for each crop."""
        maps = F.relu(self.conv2(F.max_pool2d(F.relu(self.conv1(crops)), 5)))
        if not self.pyramid:
            return self.linear(F.max_pool2d(maps, 3).flatten(1))
        return self.linear(torch.cat([_pooled(maps, 2**level).flatten(1) for level in range(self.pyramid)], 1))


def _pooled(maps: Float[Tensor, "N C y x"], parts: int) -> Float[Tensor, "N C p p"]:
    """Maxima of parts × parts windows of one size; zeros around the map, which is not negative, make it divisible."""
    height, width = maps.shape[2:]
    high, wide = -(-height // parts), -(-width // parts)
    missing_y, missing_x = high * parts - height, wide * parts - width
    padding = (missing_x // 2, missing_x - missing_x // 2, missing_y // 2, missing_y - missing_y // 2)
    return F.max_pool2d(F.pad(maps, padding), (high, wide))


class ObjectAttention(nn.Module):
    """One head: how well each step of the decoder fits each token of the encoder."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.step = nn.Linear(dim, dim)
        self.object = nn.Linear(dim, dim)

    def forward(self, steps: Float[Tensor, "B T C"], memory: Float[Tensor, "B N C"]) -> Float[Tensor, "B T N"]:
        """Scaled products."""
        return self.step(steps) @ self.object(memory).mT * steps.shape[2] ** -0.5


class OAT(nn.Module):
    """See the module.

    Args:
        rows, columns: of the shelf; its objects are counted row by row.
        crop_size: (Y, X) of an object's picture in pixels.
        dim: of a token, half for the crop and half for the position. num_heads, ffn_dim, encoder_layers,
            decoder_layers, dropout: of the transformer.
        score_heads: of the readout.
        pyramid: levels of spatial pyramid pooling, 2, 3 or 4; 0 pools to a grid.
        sigma: width of the positions' similarity, in rows. table: the positions themselves, (R, dim/6 or more), or a
            ``.npy`` file, as official runs have one; it is not part of a checkpoint.
        readout: ``"classes"`` scores by one linear layer over P + 2 classes, instead of by the objects.

    Raises: ValueError for sizes that do not fit, an unknown readout or pyramid; for crops, targets and paths of others.
    """

    def __init__(
        self,
        rows: int = 6,
        columns: int = 14,
        *,
        crop_size: tuple[int, int] = (150, 93),
        dim: int = 512,
        num_heads: int = 4,
        ffn_dim: int = 512,
        encoder_layers: int = 4,
        decoder_layers: int = 4,
        score_heads: int = 2,
        pyramid: Literal[0, 2, 3, 4] = 0,
        dropout: float = 0.1,
        sigma: float = 2.0,
        table: Float[Tensor, "R W"] | str | Path | None = None,
        readout: Readout = "objects",
    ) -> None:
        super().__init__()
        if rows < 1 or columns < 1:
            raise ValueError(f"OAT: rows and columns must be at least 1, got {rows} and {columns}")
        if dim % 2 or dim % num_heads:
            raise ValueError(f"OAT: dim must be even and a multiple of num_heads={num_heads}, got dim={dim}")
        if pyramid not in PYRAMIDS:
            raise ValueError(f"OAT: pyramid must be 0, 2, 3 or 4, got pyramid={pyramid}")
        if readout not in ("objects", "classes"):
            raise ValueError(f"OAT: readout must be 'objects' or 'classes', got readout={readout!r}")
        if score_heads < 1:
            raise ValueError(f"OAT: score_heads must be at least 1, got score_heads={score_heads}")
        self.rows, self.columns, self.objects = rows, columns, rows * columns
        self.crop_size, self.readout = (int(crop_size[0]), int(crop_size[1])), readout
        width = -(-dim // 6)
        self.table: Tensor
        self.register_buffer("table", _table(table, max(rows, columns), width, sigma), persistent=False)
        self.crops = CropEmbedding(dim // 2, self.crop_size, pyramid)
        options: dict[str, Any] = {"dim_feedforward": ffn_dim, "dropout": dropout, "batch_first": True}
        self.encoder = nn.TransformerEncoder(
            nn.TransformerEncoderLayer(dim, num_heads, **options), encoder_layers, enable_nested_tensor=False
        )
        self.decoder = nn.TransformerDecoder(nn.TransformerDecoderLayer(dim, num_heads, **options), decoder_layers)
        self.dropout = nn.Dropout(dropout)
        self.attentions = nn.ModuleList(ObjectAttention(dim) for _ in range(score_heads))
        self.heads = nn.Linear(score_heads, 1)
        self.generator = nn.Linear(dim, self.objects + 2).requires_grad_(readout == "classes")
        self.position_linear = nn.Linear(3, dim // 2).requires_grad_(False)
        if readout == "classes":
            self.attentions.requires_grad_(False)
            self.heads.requires_grad_(False)
        for parameter in self.parameters():
            if parameter.ndim > 1:
                nn.init.xavier_uniform_(parameter)

    def forward(
        self,
        crops: Float[Tensor, "B P 3 Y X"],
        target: Int[Tensor, " B"],
        path: Int[Tensor, "B T"],
        cells: Int[Tensor, "B P 2"] | None = None,
    ) -> Float[Tensor, "B T1 P2"]:
        """Scores of what is looked at next, at the start and behind each object of the path: objects, END, padding."""
        return self.scores(self.encode(crops, target, cells), path)

    def encode(
        self,
        crops: Float[Tensor, "B P 3 Y X"],
        target: Int[Tensor, " B"],
        cells: Int[Tensor, "B P 2"] | None = None,
    ) -> Seen:
        """The shelf as the decoder reads it.

        Args:
            target: the object that is searched. cells: row and column of each object; by default the grid's.
        """
        batch, count = crops.shape[:2]
        self._check(crops, target)
        cells = grid_cells(self.rows, self.columns, crops.device).expand(batch, -1, -1) if cells is None else cells
        if cells.shape != (batch, count, 2) or (
            cells.numel() and not 0 <= cells.min() <= cells.max() < len(self.table)
        ):
            raise ValueError(
                f"OAT: cells must be ({batch}, {count}, 2) numbers in 0…{len(self.table) - 1}, got {tuple(cells.shape)}"
            )
        embedded = self.crops(crops.flatten(0, 1)).unflatten(0, (batch, count))
        chosen = torch.arange(batch, device=crops.device), target
        objects = torch.cat([embedded, self._positions(cells, torch.zeros_like(cells[..., 0]))], 2)
        goal = torch.cat([embedded[chosen], self._positions(cells[chosen], torch.ones_like(target))], 1)
        memory = self.encoder(torch.cat([objects, goal.unsqueeze(1)], 1))
        return Seen(memory, embedded, cells, target)

    def scores(self, seen: Seen, path: Int[Tensor, "B T"]) -> Float[Tensor, "B T1 P2"]:
        """`forward` on a shelf that was encoded before; −1 behind the end of a shorter path."""
        batch, count = seen.objects.shape[:2]
        if path.ndim != 2 or len(path) != batch or (path.numel() and not PAD <= path.min() <= path.max() < count):
            raise ValueError(f"OAT: path must be ({batch}, T) objects in 0…{count - 1} or -1, got {tuple(path.shape)}")
        places = path.clamp(min=0)
        rows = torch.arange(batch, device=path.device)[:, None]
        marks = (path == seen.target[:, None]).long()
        fixated = torch.cat([seen.objects[rows, places], self._positions(seen.cells[rows, places], marks)], 2)
        tokens = torch.cat([self._start(seen), fixated], 1)
        steps = tokens.shape[1]
        tokens = self.dropout(tokens + steps_table(steps, tokens.shape[2], tokens))
        # Padding stands behind a path: causality hides it from every step that counts.
        mask = nn.Transformer.generate_square_subsequent_mask(steps, device=tokens.device, dtype=tokens.dtype)
        decoded = self.decoder(tokens, seen.memory, tgt_mask=mask, tgt_is_causal=True)
        if self.readout == "classes":
            return self.generator(decoded)
        fits = torch.stack([head(decoded, seen.memory) for head in self.attentions], -1)
        fits = F.pad(fits, (0, 0, 0, 1))  # padding: 0 in every head
        return (self.heads(fits) if len(self.attentions) > 1 else fits).squeeze(-1)

    def _positions(self, cells: Int[Tensor, "*n 2"], mark: Int[Tensor, "*n"]) -> Float[Tensor, "*n C"]:
        """Rows of the table for row, column and mark of the target, side by side, cut off at half a token."""
        parts = torch.cat([self.table[cells[..., 0]], self.table[cells[..., 1]], self.table[mark]], -1)
        return parts[..., : self.crops.linear.out_features].to(self.crops.linear.weight.dtype)

    def _start(self, seen: Seen) -> Float[Tensor, "B 1 C"]:
        """The token before the first fixation: a crop of ones in the middle of the shelf."""
        weight = self.crops.linear.weight
        crop = self.crops(weight.new_ones(1, 3, *self.crop_size))
        middle = torch.tensor([[self.rows // 2, self.columns // 2]], device=weight.device)
        token = torch.cat([crop, self._positions(middle, torch.zeros_like(middle[:, 0]))], 1)
        return token.expand(len(seen.target), 1, -1)

    def _check(self, crops: Tensor, target: Tensor) -> None:
        batch, count = crops.shape[:2]
        if count != self.objects or crops.shape[2:] != (3, *self.crop_size):
            raise ValueError(
                f"OAT: crops must be (B, {self.objects}, 3, {self.crop_size[0]}, {self.crop_size[1]}), "
                f"got {tuple(crops.shape)}"
            )
        if target.shape != (batch,) or (batch and not 0 <= target.min() <= target.max() < count):
            raise ValueError(f"OAT: target must be ({batch},) objects in 0…{count - 1}, got {target.tolist()}")


def _table(given: Tensor | str | Path | None, rows: int, width: int, sigma: float) -> Float[Tensor, "R W"]:
    if given is None:
        return position_table(rows, width, sigma=sigma)
    table = given if isinstance(given, Tensor) else torch.from_numpy(np.load(given, allow_pickle=False))
    if table.ndim != 2 or len(table) < rows or table.shape[1] != width:
        raise ValueError(f"OAT: table must be ({rows} or more, {width}), got {tuple(table.shape)}")
    return table.float()


# ours → official
KEY_MAP = {
    "official": (
        (r"^crops\.conv1\.", "cnn_embedding.cnn1.0."),
        (r"^crops\.conv2\.", "cnn_embedding.cnn2.0."),
        (r"^crops\.linear\.", "cnn_embedding.fc."),
        (r"^(encoder|decoder)\.", r"transformer_\1."),
        (r"^attentions\.(\d+)\.step\.", r"cross_attentions.\1.decode_fc."),
        (r"^attentions\.(\d+)\.object\.", r"cross_attentions.\1.encode_fc."),
        (r"^heads\.", "readout."),
        (r"^position_linear\.", "LinearEmbedding."),
    )
}
COMPUTED = ("onedpositional_encoding.pos_embedding",)  # sines and cosines


def load_official(model: OAT, source: Mapping[str, Any] | str | Path, *, ignore: Sequence[str] = ()) -> OAT:
    """Load an official checkpoint, every parameter or none; its table of positions goes to ``OAT(table=...)``.

    Args:
        source: a file, ``hf://owner/repo/file``, or what it holds. ignore: beginnings of our names that may differ.

    Raises: ValueError naming what is missing, unknown or of another shape.
    """
    checkpoint = weights.read(source, prefixes=("module.", "model."))
    names = weights.fitting_names(model, KEY_MAP, checkpoint)
    return weights.fill(model, checkpoint, names, ignore=ignore, computed=COMPUTED)


CARD = Card(
    family="OAT",
    paper="2407.13335",
    code="https://github.com/HKUST-NISL/oat_eccv24",
    license="",
    test="scanpaths/test_oat.py",
)
SMALL: dict[str, Any] = {"dim": 48, "ffn_dim": 32, "encoder_layers": 1, "decoder_layers": 1}
ENTRIES: list[Entry[nn.Module]] = [
    Entry("oat_amazon", OAT, CARD("18.3 M parameters, shelves of 6 × 14 book covers")),
    Entry("oat_yogurt", partial(OAT, 3, 9), CARD("18.3 M parameters, shelves of 3 × 9 cups"), (OAT,)),
    Entry("oat_wine", partial(OAT, 2, 11), CARD("18.3 M parameters, shelves of 2 × 11 bottles"), (OAT,)),
    Entry("test_oat", partial(OAT, 2, 3, crop_size=(29, 34), **SMALL), CARD("for tests"), (OAT,)),
]
