"""``seq-models tokenizer``: a tokenizer of your own text."""

from collections.abc import Iterator
from pathlib import Path
from typing import Annotated

import typer


def tokenizer(
    text: Annotated[list[Path], typer.Argument(help="Files or folders of text.", metavar="TEXT...")],
    vocab_size: Annotated[int, typer.Option(help="Tokens at most, the 256 bytes among them.", min=257)] = 4096,
    out: Annotated[Path, typer.Option(help="Folder for it.")] = Path("tokenizer"),
) -> Iterator[str]:
    """Make a byte-level BPE of your own text, for `train --tokenizer`."""
    from seq_models.data.documents import documents, files_of
    from seq_models.data.tokenizers import train_tokenizer

    if out.exists():
        raise ValueError(f"tokenizer: {out} exists; choose another --out")
    made = train_tokenizer(text, vocab_size)
    made.save_pretrained(out)
    sample = b"".join(document for document, _ in zip(documents(files_of(text)), range(100), strict=False))[: 2**20]
    tokens = len(made(sample.decode(errors="replace"), add_special_tokens=False)["input_ids"])
    yield f"wrote {out}: {len(made):,} tokens, {len(sample) / max(tokens, 1):.2f} bytes per token of this text"
