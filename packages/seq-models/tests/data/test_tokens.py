"""Text of one's own by documents and tokens: parts, packing, the cache, and what is refused by name."""

import gzip
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from seq_models.data import ByteText, TokenText
from seq_models.data.documents import documents, files_of, parts_of
from seq_models.data.language import SPLITS, Split, own_text
from seq_models.data.tokenizers import END, open_tokenizer, train_tokenizer
from seq_models.language.metrics import NATS_PER_BIT, TextScore

WORDS = ["Grüße aus Köln, ", "日本語の文 ", "x = f(y)\n", "🙂🙂 ", "ein Wort und noch ein Wort. "]


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def corpus(tmp_path: Path) -> Path:
    """JSON lines, plain and gzipped, and a plain file, whose borders of parts lie within documents."""
    folder = tmp_path / "corpus"
    folder.mkdir()
    rng = np.random.default_rng(0)
    texts = ["".join(rng.choice(WORDS, 40)) for _ in range(30)]
    lines = [json.dumps({"text": text, "id": i}, ensure_ascii=i % 2 == 0) for i, text in enumerate(texts)]
    (folder / "a.jsonl").write_text("\ufeff" + "\n".join(lines[:10]) + "\n\n", encoding="utf-8")
    (folder / "b.JSONL.GZ").write_bytes(gzip.compress("\n".join(lines[10:20]).encode()))
    (folder / "c.txt").write_text("".join(texts[20:]), encoding="utf-8")
    return folder


@pytest.fixture
def tokenizer(corpus: Path, tmp_path: Path) -> Path:
    train_tokenizer(corpus, 300).save_pretrained(tmp_path / "tokenizer")
    return tmp_path / "tokenizer"


def test_the_parts_are_the_whole_text_cut_between_characters(corpus: Path) -> None:
    files = files_of(corpus)
    parts = [b"".join(parts_of(files, part)) for part in range(3)]
    whole = b"".join(documents(files))
    assert b"".join(parts) == whole
    for part, share in zip(parts, (0.8, 0.1, 0.1), strict=True):
        part.decode()  # no character is torn
        assert len(part) == pytest.approx(share * len(whole), abs=8)
    assert own_text(corpus, "val").tobytes() == parts[1]


@pytest.mark.parametrize("length", [7, 16])
@pytest.mark.parametrize("split", SPLITS)
def test_windows_are_the_tokens_of_all_documents_with_an_end_behind_each(
    corpus: Path, tokenizer: Path, split: Split, length: int
) -> None:
    data = TokenText(split, text=corpus, tokenizer=tokenizer, length=length)
    opened = open_tokenizer(tokenizer)
    expected: list[int] = []
    size = 0
    for part in parts_of(files_of(corpus), SPLITS[split]):
        expected += [*opened.encode(part.decode()), opened.convert_tokens_to_ids(END)]
        size += len(part)
    served: Any = torch.cat([data[i]["input_ids"] for i in range(len(data))]).tolist()
    assert served == expected[: len(expected) // length * length]
    assert data.metainfo["bytes_per_token"] == pytest.approx(size / len(expected))
    assert opened.decode(served).replace(END, "") in b"".join(parts_of(files_of(corpus), SPLITS[split])).decode()


def test_tokens_are_made_once_and_again_when_text_or_tokenizer_change(
    corpus: Path, tokenizer: Path, own_cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = TokenText("val", text=corpus, tokenizer=tokenizer, length=8)
    with monkeypatch.context() as patch:
        patch.setattr("seq_models.data.tokens.open_tokenizer", None)  # nothing is made a second time
        again = TokenText("val", text=[corpus], tokenizer=tokenizer, length=8)
    assert torch.equal(first[3]["input_ids"], again[3]["input_ids"])
    (corpus / "c.txt").write_text("".join(WORDS) * 90, encoding="utf-8")
    changed = TokenText("val", text=corpus, tokenizer=tokenizer, length=8)
    assert not torch.equal(first[0]["input_ids"], changed[0]["input_ids"])
    train_tokenizer(corpus, 280).save_pretrained(tokenizer)
    assert len(TokenText("val", text=corpus, tokenizer=tokenizer, length=8)) > len(changed)
    assert isinstance(changed.tokens, np.memmap)
    assert not list(own_cache.rglob("tmp*"))  # no partial file stays


def test_an_interrupted_start_leaves_no_tokens(corpus: Path, tokenizer: Path, own_cache: Path) -> None:
    (corpus / "b.JSONL.GZ").write_bytes((corpus / "b.JSONL.GZ").read_bytes()[:-40])
    with pytest.raises(ValueError, match=r"b.JSONL.GZ is damaged: "):
        TokenText("train", text=corpus, tokenizer=tokenizer, length=8)
    assert not [file for file in own_cache.rglob("*") if file.is_file()]


def test_a_tokenizer_gives_every_text_back_and_ends_below_its_size(corpus: Path) -> None:
    made = train_tokenizer(corpus, 300)
    assert 257 < len(made) <= 300
    for text in (*WORDS, "never seen: ☃ \x00\r\n  two  blanks"):
        assert made.decode(made.encode(text)) == text
    assert len(made.encode(WORDS[4])) < len(WORDS[4].encode())


def test_bits_per_byte_are_bits_per_token_shared_among_its_bytes() -> None:
    score = TextScore()
    score.dataset_meta = {"bytes_per_token": 4.0}
    rows = [{"nats": 8 * NATS_PER_BIT, "tokens": 2, "hits": 1}, {"nats": 4 * NATS_PER_BIT, "tokens": 1, "hits": 1}]
    score.process({}, rows)
    found = score.compute_metrics(score.results)
    assert (found["bits_per_token"], found["bits_per_byte"]) == (pytest.approx(4.0), pytest.approx(1.0))


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("a.jsonl", '{"text": "a"}\n{"text": ', "line 2 is no JSON"),
        (
            "a.jsonl",
            '{"body": "a", "n": 1}',
            "line 1 needs a string in the field 'text'; it has the fields 'body', 'n'",
        ),
        ("a.jsonl", '{"text": null}', "line 1 needs a string in the field 'text'"),
        ("a.ndjson", "[1, 2]", r"line 1 needs a string in the field 'text'; it is b'\[1, 2\]'"),
        ("a.txt", "short", "the train part of the text has 4 bytes, fewer than one window of 8"),
        ("a.txt", "", "the train part of the text has 0 bytes"),
    ],
)
def test_text_that_cannot_be_used_is_refused_with_its_place(
    tmp_path: Path, name: str, content: str, words: str
) -> None:
    (tmp_path / name).write_text(content)
    with pytest.raises(ValueError, match=words):
        ByteText("train", text=tmp_path / name, length=8)


def test_what_is_no_tokenizer_is_refused(corpus: Path, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    for source, words in (
        (tmp_path / "none", "does not exist"),
        (corpus / "c.txt", "holds no tokenizer that transformers reads"),
        (tmp_path / "empty", "holds no tokenizer that transformers reads"),
    ):
        with pytest.raises(ValueError, match=words) as caught:
            open_tokenizer(source)
        assert len(str(caught.value).splitlines()) == 1
    with pytest.raises(ValueError, match="vocab_size must be at least 257"):
        train_tokenizer(corpus, 256)
    with pytest.raises(ValueError, match="length must be at least 1"):
        TokenText("train", text=corpus, tokenizer=tmp_path, length=0)
