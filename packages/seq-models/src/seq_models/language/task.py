"""Training of causal language models."""

from typing import Any

from jaxtyping import Int
from torch import Tensor, nn
from torch.nn import functional as F

from attn_core.engine import Hook, TaskModel, build
from seq_models.data.tokenizers import open_tokenizer
from seq_models.language.language_model import IGNORED

TOKENIZER_FOLDER = "tokenizer"  # in a run directory


class LanguageTask(TaskModel):
    """Next-token training of a causal language model.

    Items are ``{"input_ids": (N,), "labels": (N,)}``: labels are the tokens themselves, −100 where they do not count
    (the model shifts them).

    Args:
        net: the model, or its recipe ``dict(type=TitansForCausalLM, config=dict(type=TitansConfig, ...))``, or
            ``dict(type=create_model, name=..., ...)`` with a name of ``list_models()``.
    """

    def __init__(self, net: nn.Module | dict[str, Any]) -> None:
        super().__init__()
        built: nn.Module = build(net)
        self.net: Any = built

    def loss(  # pyright: ignore[reportIncompatibleMethodOverride]
        self, input_ids: Int[Tensor, "B N"], labels: Int[Tensor, "B N"]
    ) -> dict[str, Tensor]:
        """The model's loss: mean cross-entropy in nats, and what the family adds."""
        return {"loss": self.net(input_ids, labels=labels, use_cache=False).loss}

    def predict(  # pyright: ignore[reportIncompatibleMethodOverride]
        self, input_ids: Int[Tensor, "B N"], labels: Int[Tensor, "B N"]
    ) -> list[dict[str, Any]]:
        """Per row, over its counted tokens: ``{"nats": sum, "tokens": count, "hits": right ones by argmax}``."""
        logits = self.net(input_ids, use_cache=False).logits[:, :-1].float()
        target = labels[:, 1:]
        nats = F.cross_entropy(logits.mT, target, ignore_index=IGNORED, reduction="none").sum(1)
        counted = target != IGNORED
        hits = ((logits.argmax(-1) == target) & counted).sum(1)
        columns = (nats.tolist(), counted.sum(1).tolist(), hits.tolist())
        return [{"nats": a, "tokens": b, "hits": c} for a, b, c in zip(*columns, strict=True)]


class KeepTokenizer(Hook):
    """Copies the tokenizer into the run directory, ``tokenizer/``, so that the run is whole without the file.

    Args:
        tokenizer: see `seq_models.data.tokenizers.open_tokenizer`.
    """

    def __init__(self, tokenizer: str) -> None:
        self.tokenizer = tokenizer

    def before_train(self, runner: Any) -> None:
        """Copy it, unless a resumed run has it already."""
        folder = runner.directory / TOKENIZER_FOLDER
        if runner.rank == 0 and not folder.exists():
            open_tokenizer(self.tokenizer).save_pretrained(folder)


class RetrievalHook(Hook):
    """Landmark models learn to read blocks of short texts where they are first, then retrieved blocks of longer texts.

    Args:
        begin: first step of the second part.
        length: tokens of its texts. The data set has a ``length`` and is read without workers.
    """

    def __init__(self, begin: int, length: int) -> None:
        self.begin, self.length = begin, length

    def before_train(self, runner: Any) -> None:
        """Begin, or resume, in the right part."""
        self._prepare(runner, runner.iter)

    def after_train_iter(self, runner: Any, batch_idx: int, data_batch: Any = None, outputs: Any = None) -> None:  # noqa: ARG002  mmengine's hook
        """Prepare the next step."""
        self._prepare(runner, runner.iter + 1)

    def _prepare(self, runner: Any, step: int) -> None:
        if step >= self.begin:
            runner.bare_model.net.config.training_reads = "retrieved"
            runner.train_dataloader.dataset.length = self.length
