"""ACMIL: a bag of instance features is classified through several attention branches that are kept different.

Paper: Zhang, Li, Sun, Zheng, Zhu, Yang, Attention-Challenging Multiple Instance Learning for Whole Slide Image
Classification, ECCV 2024 (arXiv 2311.07125). ABMIL, its single branch: Ilse, Tomczak, Welling, ICML 2018
(arXiv 1802.04712).
Official code: https://github.com/dazhangyu123/ACMIL (MIT), architecture/transformer.py (``ACMIL_GA``, ``ACMIL_MHA``,
``ABMIL``); the losses in Step3_WSI_classification_ACMIL.py.

Same: every layer and name, the masking of the most attended instances, the three losses with weight 1.
Differs: batches of bags of different size (a mask says what is padding); a bag may come in pieces
(`BagNetwork.stream`), so that 100,000 instances take the memory of their attention. Keys and values are never made:
both are linear in an instance, so a head's query is carried to the instances (O(N·D) for each head, officially
O(N·D²)) and its values are projected after pooling. Instances are masked by default with probability 0, as the
authors advise for newer encoders; the paper has 0.6. Mean and max pooling share all of ABMIL but its attention.
Checked: tests/models/test_acmil.py, against plain networks that make keys and values of every instance.

Shapes: features (B, N, C), mask (B, N) true where an instance is → `BagOutput`.
"""

import argparse
import math
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from torch.nn import functional as F

from attn_core import weights
from attn_core.catalog import Card, Entry

# Official widths for the encoders that the authors name: ViT-S/16, ResNet-18 and CLIP ViT-B, CLIP ViT-L, UNI, GigaPath.
WIDTHS = {384: 128, 512: 256, 768: 384, 1024: 512, 1536: 768}
HIDDEN = -1e9  # the logit of a masked instance; −inf would leave nothing of a bag that is masked whole


class BagOutput(NamedTuple):
    """What a network says about bags.

    Attributes:
        logits: of the bag (B, K).
        branches: of each branch (B, R, K); R = 0 for networks without.
        attention: logits (B, R, H, N) before the softmax over instances, −inf where there is none, −1e9 where one was
            masked; of pooling networks the class logits of each instance alone (B, K, 1, N).
    """

    logits: Tensor
    branches: Tensor
    attention: Tensor


class BagNetwork(nn.Module, ABC):
    """Instances are projected and pooled into what is said about their bag.

    Args:
        in_channels: C, features of an instance.
        out_channels: K, classes.
        width: of the projected features; None takes the official one for C, else half of C.

    Raises: ValueError for sizes below 1.
    """

    def __init__(self, in_channels: int, out_channels: int, width: int | None) -> None:
        super().__init__()
        width = WIDTHS.get(in_channels, -(-in_channels // 16) * 8) if width is None else width
        if min(in_channels, out_channels, width) < 1:
            raise ValueError(
                f"{type(self).__name__}: in_channels, out_channels and width must be at least 1, "
                f"got {in_channels}, {out_channels} and {width}"
            )
        self.in_channels = in_channels
        self.out_channels = out_channels
        self.width = width
        self.dimreduction = nn.ModuleDict({"fc1": nn.Linear(in_channels, width, bias=False)})

    @abstractmethod
    def forward(self, features: Float[Tensor, "B N C"], mask: Bool[Tensor, "B N"] | None = None) -> BagOutput:
        """Classify bags.

        Args:
            mask: where instances are; None: everywhere.

        Raises: ValueError if features have another shape or number of channels, or a bag is empty.
        """

    @abstractmethod
    def stream(self, pieces: Iterable[Tensor]) -> BagOutput:
        """One bag in pieces, as in evaluation: memory for the logits of all instances and for one piece.

        Args:
            pieces: features (n, C) of some instances each, together the bag.

        Returns: what `forward` gives for the whole bag, B = 1.
        Raises: ValueError if there are no instances, or features have another number of channels.
        """

    @abstractmethod
    def importance(self, output: BagOutput) -> Float[Tensor, "B N"]:
        """What a heat map shows of each instance."""

    def _project(self, features: Tensor) -> Tensor:
        return F.relu(self.dimreduction["fc1"](features))

    def _check(self, features: Tensor, mask: Tensor | None) -> None:
        name = type(self).__name__
        if features.ndim != 3:
            raise ValueError(f"{name}: expected features (B N C), got shape {tuple(features.shape)}")
        if features.shape[2] != self.in_channels:
            raise ValueError(f"{name}: the network reads {self.in_channels} features, got {features.shape[2]}")
        if not features.shape[1]:
            raise ValueError(f"{name}: a bag needs at least one instance, got none")
        if mask is None:
            return
        if mask.shape != features.shape[:2] or mask.dtype != torch.bool:
            raise ValueError(
                f"{name}: mask must be bool of shape {tuple(features.shape[:2])}, got {mask.dtype} {tuple(mask.shape)}"
            )
        if not bool(mask.any(1).all()):
            raise ValueError(f"{name}: bag {int(mask.any(1).logical_not().nonzero()[0])} of the batch has no instance")


class AttentionNetwork(BagNetwork):
    """Instances are weighed by R·H softmax maps and pooled; what is pooled is classified. Arguments of `BagNetwork`."""

    @abstractmethod
    def weigh(self, h: Float[Tensor, "B N W"]) -> Float[Tensor, "B R H N"]:
        """Logits of the attention of each branch and head."""

    @abstractmethod
    def classify(self, pooled: Float[Tensor, "B R H W"]) -> tuple[Float[Tensor, "B K"], Float[Tensor, "B branches K"]]:
        """Class logits of the bag and of its branches from what each map has pooled."""

    def forward(self, features: Float[Tensor, "B N C"], mask: Bool[Tensor, "B N"] | None = None) -> BagOutput:
        """Classify bags; `BagNetwork.forward`."""
        self._check(features, mask)
        h = self._project(features)
        logits = self._hidden(_without_padding(self.weigh(h), mask), mask)
        pooled = torch.einsum("brhn,bnw->brhw", logits.softmax(-1).to(h.dtype), h)
        return BagOutput(*self.classify(pooled), logits)

    @torch.no_grad()
    def stream(self, pieces: Iterable[Tensor]) -> BagOutput:
        """One bag in pieces (n, C); `BagNetwork.stream`."""
        every, total, pooled, most = [], torch.zeros(()), torch.zeros(()), torch.full((), -torch.inf)
        for piece in pieces:
            self._check(piece[None], None)
            h = self._project(piece[None])
            logits = _precise(self.weigh(h)[0])
            # The softmax so far, as seen from the new maximum.
            above = torch.maximum(most.to(logits), logits.amax(-1))
            shrink, share = (most.to(logits) - above).exp(), (logits - above[..., None]).exp()
            total = total.to(logits) * shrink + share.sum(-1)
            pooled = pooled.to(logits) * shrink[..., None] + torch.einsum("rhn,nw->rhw", share, h[0].to(logits))
            most = above
            every.append(logits)
        if not every:
            raise ValueError(f"{type(self).__name__}: a bag needs at least one instance, got none")
        found = (pooled / total[..., None]).to(next(self.parameters()))
        return BagOutput(*self.classify(found[None]), torch.cat(every, -1)[None])

    def importance(self, output: BagOutput) -> Float[Tensor, "B N"]:
        """The mean of all attention maps, which sums to 1 in each bag."""
        return output.attention.softmax(-1).mean((1, 2))

    def _hidden(self, logits: Tensor, mask: Tensor | None) -> Tensor:  # noqa: ARG002  networks with branches hide some
        return logits


class Classifier(nn.Module):
    """A linear layer behind dropout, under its official name."""

    def __init__(self, channels: int, classes: int, dropout: float) -> None:
        super().__init__()
        self.fc = nn.Linear(channels, classes)
        self.dropout = dropout

    def forward(self, x: Float[Tensor, "... W"]) -> Float[Tensor, "... K"]:
        """Class logits."""
        return self.fc(F.dropout(x, self.dropout, self.training))


class GatedAttention(nn.Module):
    """A = W(tanh(Vh) ⊙ σ(Uh)): one logit for each branch."""

    def __init__(self, width: int, hidden: int, branches: int) -> None:
        super().__init__()
        self.attention_V = nn.Sequential(nn.Linear(width, hidden), nn.Tanh())
        self.attention_U = nn.Sequential(nn.Linear(width, hidden), nn.Sigmoid())
        self.attention_weights = nn.Linear(hidden, branches)

    def forward(self, h: Float[Tensor, "B N W"]) -> Float[Tensor, "B R N"]:
        """Logits of each branch."""
        return self.attention_weights(self.attention_V(h) * self.attention_U(h)).transpose(1, 2)


class ABMIL(AttentionNetwork):
    """Gated attention, one branch.

    Args:
        hidden: width of the gates.
        dropout: before the classifier.
    """

    def __init__(
        self,
        in_channels: int = 384,
        out_channels: int = 2,
        *,
        width: int | None = None,
        hidden: int = 128,
        dropout: float = 0.0,
    ) -> None:
        super().__init__(in_channels, out_channels, width)
        self.attention = GatedAttention(self.width, hidden, 1)
        self.classifier = Classifier(self.width, out_channels, dropout)

    def weigh(self, h: Float[Tensor, "B N W"]) -> Float[Tensor, "B R H N"]:
        """Logits (B, 1, 1, N)."""
        return self.attention(h)[:, :, None]

    def classify(self, pooled: Float[Tensor, "B R H W"]) -> tuple[Float[Tensor, "B K"], Float[Tensor, "B branches K"]]:
        """The bag alone; no branch has a classifier of its own."""
        logits = self.classifier(pooled[:, 0, 0])
        return logits, logits[:, None][:, :0]


class _Branches(AttentionNetwork):
    """Several branches, whose most attended instances are masked at random in training."""

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        width: int | None,
        branches: int,
        masked: int,
        mask_drop: float,
        dropout: float,
    ) -> None:
        super().__init__(in_channels, out_channels, width)
        if branches < 1 or masked < 0 or not 0 <= mask_drop <= 1:
            raise ValueError(
                f"{type(self).__name__}: expected branches ≥ 1, masked ≥ 0 and 0 ≤ mask_drop ≤ 1, "
                f"got {branches}, {masked} and {mask_drop}"
            )
        self.masked = masked
        self.mask_drop = mask_drop
        self.classifier = nn.ModuleList(Classifier(self.width, out_channels, dropout) for _ in range(branches))
        self.Slide_classifier = Classifier(self.width, out_channels, dropout)

    def _hidden(self, logits: Tensor, mask: Tensor | None) -> Tensor:
        if not self.training or not self.masked or not self.mask_drop:
            return logits
        return mask_most_attended(logits, mask, self.masked, self.mask_drop)


class ACMIL(_Branches):
    """Gated attention in several branches (ACMIL-GA).

    Args:
        branches: R; each attends and is classified on its own, and the bag by the mean of their maps.
        masked: how many of the most attended instances of a branch may be masked in training.
        mask_drop: the share of these that are.
        hidden: width of the gates.
        dropout: before each classifier.
    """

    def __init__(
        self,
        in_channels: int = 384,
        out_channels: int = 2,
        *,
        width: int | None = None,
        branches: int = 5,
        masked: int = 10,
        mask_drop: float = 0.0,
        hidden: int = 128,
        dropout: float = 0.0,
    ) -> None:
        super().__init__(in_channels, out_channels, width, branches, masked, mask_drop, dropout)
        self.attention = GatedAttention(self.width, hidden, branches)

    def weigh(self, h: Float[Tensor, "B N W"]) -> Float[Tensor, "B R H N"]:
        """Logits (B, R, 1, N)."""
        return self.attention(h)[:, :, None]

    def classify(self, pooled: Float[Tensor, "B R H W"]) -> tuple[Float[Tensor, "B K"], Float[Tensor, "B branches K"]]:
        """Each branch from its own pooled features, the bag from their mean."""
        branches = [read(pooled[:, branch, 0]) for branch, read in enumerate(self.classifier)]
        return self.Slide_classifier(pooled[:, :, 0].mean(1)), torch.stack(branches, 1)


class BranchAttention(nn.Module):
    """A query over the instances in several heads; dropout and normalization of what it finds.

    Args:
        width: W.
        heads: H; they divide W.
        dropout: of the output.
        query: whether it attends itself; the bag's takes the maps of the branches.
    """

    def __init__(self, width: int, heads: int, dropout: float, *, query: bool = True) -> None:
        super().__init__()
        self.heads = heads
        self.dropout = dropout
        if query:
            self.q_proj = nn.Linear(width, width)
            self.k_proj = nn.Linear(width, width)
        self.v_proj = nn.Linear(width, width)
        self.out_proj = nn.Linear(width, width)
        self.layer_norm = nn.LayerNorm(width, eps=1e-6)

    def probe(self, query: Float[Tensor, "W"]) -> tuple[Float[Tensor, "H W"], Float[Tensor, "H"]]:
        """What each head multiplies an instance by, and adds, to get its logit: q·(K h + b) = (Kᵀq)·h + q·b."""
        q = self.q_proj(query).unflatten(-1, (self.heads, -1)) / math.sqrt(len(query) // self.heads)
        keys, bias = (value.unflatten(0, (self.heads, -1)) for value in (self.k_proj.weight, self.k_proj.bias))
        return torch.einsum("hd,hdw->hw", q, keys), (q * bias).sum(-1)

    def forward(self, pooled: Float[Tensor, "B H W"]) -> Float[Tensor, "B W"]:
        """From what each head has pooled: weights of a map sum to 1, so values are projected after pooling."""
        values = self.v_proj.weight.unflatten(0, (self.heads, -1))
        found = torch.einsum("bhw,hdw->bhd", pooled, values).flatten(1) + self.v_proj.bias
        return self.layer_norm(F.dropout(self.out_proj(found), self.dropout, self.training))


class ACMILMultiHead(_Branches):
    """Multi-head attention of a learned query in several branches (ACMIL-MHA).

    Args:
        branches, masked, mask_drop: as of `ACMIL`; instances are masked in each head.
        heads: H; they must divide the width.
        dropout: of the attention's output.

    Raises: ValueError if heads do not divide the width.
    """

    def __init__(
        self,
        in_channels: int = 384,
        out_channels: int = 2,
        *,
        width: int | None = None,
        branches: int = 5,
        masked: int = 10,
        mask_drop: float = 0.0,
        heads: int = 8,
        dropout: float = 0.1,
    ) -> None:
        super().__init__(in_channels, out_channels, width, branches, masked, mask_drop, 0.0)
        if heads < 1 or self.width % heads:
            raise ValueError(f"ACMILMultiHead: heads={heads} do not divide width={self.width}")
        self.sub_attention = nn.ModuleList(BranchAttention(self.width, heads, dropout) for _ in range(branches))
        self.bag_attention = BranchAttention(self.width, heads, dropout, query=False)
        self.q = nn.Parameter(torch.empty(1, branches, self.width))
        nn.init.normal_(self.q, std=1e-6)

    def weigh(self, h: Float[Tensor, "B N W"]) -> Float[Tensor, "B R H N"]:
        """Scaled products of each branch's query with the keys of its heads."""
        attends: Any = self.sub_attention
        probes, biases = zip(*(attend.probe(q) for attend, q in zip(attends, self.q[0], strict=True)), strict=True)
        return torch.einsum("rhw,bnw->brhn", torch.stack(probes), h) + torch.stack(biases)[..., None]

    def classify(self, pooled: Float[Tensor, "B R H W"]) -> tuple[Float[Tensor, "B K"], Float[Tensor, "B branches K"]]:
        """Each branch from its own heads, the bag from the mean of the branches' maps, by head."""
        pairs = zip(self.sub_attention, self.classifier, strict=True)
        branches = [read(attend(pooled[:, branch])) for branch, (attend, read) in enumerate(pairs)]
        return self.Slide_classifier(self.bag_attention(pooled.mean(1))), torch.stack(branches, 1)


class MeanPooling(BagNetwork):
    """ABMIL with the mean in place of attention."""

    def __init__(
        self, in_channels: int = 384, out_channels: int = 2, *, width: int | None = None, dropout: float = 0.0
    ) -> None:
        super().__init__(in_channels, out_channels, width)
        self.classifier = Classifier(self.width, out_channels, dropout)

    def forward(self, features: Float[Tensor, "B N C"], mask: Bool[Tensor, "B N"] | None = None) -> BagOutput:
        """Classify bags; `BagNetwork.forward`."""
        self._check(features, mask)
        return self._pooled(_without_padding(self._alone(features), mask))

    @torch.no_grad()
    def stream(self, pieces: Iterable[Tensor]) -> BagOutput:
        """One bag in pieces (n, C); `BagNetwork.stream`."""
        every = []
        for piece in pieces:
            self._check(piece[None], None)
            every.append(self._alone(piece[None]))
        if not every:
            raise ValueError(f"{type(self).__name__}: a bag needs at least one instance, got none")
        return self._pooled(torch.cat(every, -1))

    def importance(self, output: BagOutput) -> Float[Tensor, "B N"]:
        """The probability that an instance alone gives to the class of its bag."""
        found = output.logits.argmax(-1)
        alone = output.attention[:, :, 0].softmax(1).nan_to_num(0.0)
        return alone[torch.arange(len(found), device=found.device), found]

    def _alone(self, features: Tensor) -> Tensor:
        """Class logits of each instance (B, K, 1, N)."""
        return self.classifier(self._project(features)).transpose(1, 2)[:, :, None]

    def _pooled(self, alone: Tensor) -> BagOutput:
        there = alone[:, :, 0] != -torch.inf
        # A linear layer of the mean is the mean of the linear layer.
        logits = alone[:, :, 0].where(there, 0.0).sum(-1) / there.sum(-1)
        return BagOutput(logits, logits[:, None][:, :0], alone)


class MaxPooling(MeanPooling):
    """The largest class logits that any instance has."""

    def _pooled(self, alone: Tensor) -> BagOutput:
        logits = alone[:, :, 0].amax(-1)
        return BagOutput(logits, logits[:, None][:, :0], alone)


def mask_most_attended(
    logits: Float[Tensor, "B R H N"], mask: Bool[Tensor, "B N"] | None, most: int, share: float
) -> Float[Tensor, "B R H N"]:
    """Stochastic top-k instance masking: of the M largest logits of each map ⌊M·share⌋ at random become −1e9.

    M is ``most``, or the number of the bag's instances if that is less.
    """
    count = min(most, logits.shape[-1])
    top = logits.topk(count, dim=-1).indices  # padding, −inf, comes last
    draw = torch.rand(top.shape, device=logits.device)
    if mask is None:
        drop = draw.argsort(-1).argsort(-1) < int(count * share)
    else:
        available = mask.sum(-1).clamp(max=most)[:, None, None, None]
        draw = draw.masked_fill(torch.arange(count, device=logits.device) >= available, 2.0)
        drop = draw.argsort(-1).argsort(-1) < (available.double() * share).floor()
    return logits.masked_fill(torch.zeros_like(logits, dtype=torch.bool).scatter(-1, top, drop), HIDDEN)


def diversity(attention: Float[Tensor, "B R H N"]) -> Float[Tensor, ""]:
    """Mean cosine between the softmax maps of every two branches; 1 where they attend alike."""
    maps = F.normalize(attention.softmax(-1), dim=-1)
    first, second = torch.triu_indices(attention.shape[1], attention.shape[1], 1, device=attention.device)
    return torch.einsum("brhn,bshn->bhrs", maps, maps)[:, :, first, second].mean()


def bag_loss(output: BagOutput, label: Int[Tensor, "B"]) -> dict[str, Tensor]:
    """Cross-entropy of the bag; with several branches also theirs, and how alike they attend. Each weighs 1.

    The maps are those of training: masked instances have no weight in them.
    """
    losses = {"loss_bag": F.cross_entropy(_precise(output.logits), label)}
    branches = output.branches.shape[1]
    if branches > 1:
        alone = _precise(output.branches).flatten(0, 1)
        losses["loss_branches"] = F.cross_entropy(alone, label.repeat_interleave(branches))
        losses["loss_diversity"] = diversity(output.attention)
    return losses


def load_official(
    model: BagNetwork, source: Mapping[str, Any] | str | Path, *, ignore: Sequence[str] = ()
) -> BagNetwork:
    """Copy an official checkpoint into a network: every parameter or none; names are ours.

    Args:
        source: a file (``checkpoint-best.pth``), ``hf://owner/repo/file``, or what it holds. Its settings, an object of
            a class of the authors, are read as plain attributes: nothing of the file is executed.
        ignore: beginnings of parameter names that may be missing or differ, such as ``("classifier", )``.

    Raises: ValueError if the file cannot be read, or names or shapes do not fit; the message lists them.
    """
    with torch.serialization.safe_globals([(argparse.Namespace, "utils.utils.Struct")]):
        return weights.fill(model, weights.read(source), ignore=ignore)


def _without_padding(logits: Tensor, mask: Tensor | None) -> Tensor:
    logits = _precise(logits)
    return logits if mask is None else logits.masked_fill(~mask[:, None, None], -torch.inf)


def _precise(logits: Tensor) -> Tensor:
    """In float32 at least, so that −1e9 and sums of 100,000 weights can be written down."""
    return logits.float() if logits.dtype in (torch.float16, torch.bfloat16) else logits


CARD = Card(
    family="ACMIL",
    paper="2311.07125",
    code="https://github.com/dazhangyu123/ACMIL",
    license="MIT",
    test="models/test_acmil.py",
)
ENTRIES = [
    Entry("acmil_ga", ACMIL, CARD("Bags through five branches of gated attention.")),
    Entry("acmil_mha", ACMILMultiHead, CARD("Bags through five branches of eight-headed attention.")),
    Entry("abmil", ABMIL, CARD("Bags through one gated attention.")),
    Entry("mean_pooling", MeanPooling, CARD("Bags through the mean of their instances: the baseline.")),
    Entry("max_pooling", MaxPooling, CARD("Bags through their strongest instance: the baseline.")),
    Entry("test_acmil", partial(ACMIL, 8, width=8, branches=2), CARD("For tests.")),
]
