"""Text and generated tasks: what counts, splits that do not meet, errors."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from seq_models.data import AssociativeRecall, ByteText, Needle, Passkey, SelectiveCopy
from seq_models.data.language import counted_bits, standard_library
from seq_models.language.language_model import IGNORED
from seq_models.language.metrics import ByteScore

TASKS: list[Any] = [AssociativeRecall, SelectiveCopy, Passkey, Needle]


@pytest.mark.parametrize("task", TASKS)
def test_items_are_fixed_and_splits_differ(task: Any) -> None:
    first, again, val = task("train", size=5), task("train", size=50), task("val", size=5)
    for index in range(5):
        assert torch.equal(first[index]["input_ids"], again[index]["input_ids"])
        assert not torch.equal(first[index]["input_ids"], val[index]["input_ids"])
        ids, labels = first[index]["input_ids"], first[index]["labels"]
        assert ids.shape == labels.shape == (first.length,)
        assert 0 <= int(ids.min()) <= int(ids.max()) < first.vocab_size
        counted = labels != IGNORED
        assert torch.equal(ids[counted], labels[counted])
    assert len(first) == 5
    with pytest.raises(IndexError):
        first[5]


def test_every_recalled_value_was_paired_with_the_key_before_it() -> None:
    for item in (AssociativeRecall(pairs=6, length=48)[i] for i in range(20)):
        ids, labels = item["input_ids"].tolist(), item["labels"].tolist()
        pairs = dict(zip(ids[0:12:2], ids[1:12:2], strict=True))
        asked = [place for place, label in enumerate(labels) if label != IGNORED]
        assert len(asked) == 6
        assert all(pairs[ids[place - 1]] == ids[place] for place in asked)
        assert len(pairs) == 6


def test_copied_tokens_are_those_between_the_blanks_in_order() -> None:
    for item in (SelectiveCopy(tokens=5, length=30)[i] for i in range(20)):
        ids = item["input_ids"].tolist()
        assert [token for token in ids[:24] if token] == ids[25:]
        assert ids[24] == 1
        assert (item["labels"] != IGNORED).sum() == 5


@pytest.mark.parametrize("order", [0, 1, 2])
def test_counted_bits_equal_a_loop_over_bytes(order: int) -> None:
    rng = np.random.default_rng(0)
    text, windows = (rng.integers(97, 100, size).astype(np.uint8) for size in (300, (4, 9)))
    content, bits = text.tobytes(), []
    for row in windows:
        for place in range(1, 9):
            chance = 1 / 256
            for k in range(min(order, place) + 1):
                before, whole = row[place - k : place].tobytes(), row[place - k : place + 1].tobytes()
                starts = [i for i in range(len(content) - k) if content[i : i + k] == before]
                found = sum(content[i : i + k + 1] == whole for i in starts)
                chance = (found + 4 * chance) / (len(starts) + 4)
            bits.append(-np.log2(chance))
    assert counted_bits(order, text, windows) == pytest.approx(np.mean(bits), abs=1e-12)


def test_counted_bits_of_a_long_context_are_refused() -> None:
    with pytest.raises(ValueError, match="order must be 0, 1 or 2"):
        counted_bits(3, np.zeros(9, np.uint8), np.zeros((1, 9), np.uint8))


def test_the_answer_stands_once_more_in_the_text() -> None:
    for task, line in ((Passkey, "The pass key is {}. Remember {}. "), (Needle, "The word of Ada is {}. ")):
        data = task(length=200)
        begins = set()
        for item in (data[i] for i in range(20)):
            text = bytes(item["input_ids"].tolist()).decode()
            answer = bytes(item["labels"][item["labels"] != IGNORED].tolist()).decode()
            begins.add(text.index(line.format(answer, answer)))
            assert text.endswith(" is " + answer)
        assert len(begins) > 10


def test_keys_have_as_many_characters_as_asked_for() -> None:
    for task in (Passkey, Needle):
        for digits in (2, 6):
            labels = task(length=200, digits=digits)[0]["labels"]
            assert int((labels != IGNORED).sum()) == digits


def test_reminders_state_the_key_behind_the_line_and_count() -> None:
    statements = set()
    for item in (Passkey(reminders=5)[i] for i in range(40)):
        text = bytes(item["input_ids"].tolist()).decode()
        key = text[-4:]
        places = [i for i in range(len(text)) if text.startswith(key, i)]
        statements.add(len(places))
        counted = (item["labels"] != IGNORED).nonzero().flatten().tolist()
        assert counted == [place + i for place in places[1:] for i in range(4)]
        assert text.index(f"The pass key is {key}. Remember {key}. ") < text.index(f"Remember {key}. ")
        assert text.count(f"Remember {key}. ") == len(places) - 2
    assert statements == {3, 4, 5, 6, 7, 8}


def test_splits_of_the_standard_library_are_disjoint_text() -> None:
    parts = {split: standard_library(split) for split in ("train", "val", "test")}
    assert len(parts["train"]) > 8 * len(parts["val"]) > 0
    head = bytes(parts["val"][:400])
    assert head not in bytes(parts["train"])
    assert b"def " in bytes(parts["test"])
    windows = ByteText("val", length=64, limit=10)
    assert len(windows) == 10
    item = windows[3]
    assert item["input_ids"].dtype == torch.int64
    assert torch.equal(item["input_ids"], item["labels"])


def test_own_files_are_read_and_split_in_order(tmp_path: Path) -> None:
    (tmp_path / "b" / "deep").mkdir(parents=True)
    (tmp_path / "a.bin").write_bytes(bytes(range(40)))
    (tmp_path / "b" / "deep" / "X.TXT").write_bytes(bytes(range(40, 100)))
    (tmp_path / "b" / "picture.png").write_bytes(b"no text")
    files = [tmp_path / "a.bin", str(tmp_path / "b")]
    served = [ByteText(split, length=5, text=files).windows for split in ("train", "val", "test")]
    assert np.concatenate([part.ravel() for part in served]).tolist() == list(range(100))
    with pytest.raises(ValueError, match="the val part of the text has 10 bytes, fewer than one window of 64; give"):
        ByteText("val", length=64, text=files)
    with pytest.raises(ValueError, match="def f does not exist"):  # a text itself is no file
        ByteText(text="def f")


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: ByteText("dev"), "ByteText: split must be 'train', 'val' or 'test', got split='dev'"),  # pyright: ignore[reportArgumentType]
        (lambda: ByteText(length=0), "ByteText: length must be at least 1, got length=0"),
        (lambda: AssociativeRecall(pairs=40), "pairs must be at most the 31 keys, got pairs=40"),
        (lambda: AssociativeRecall(length=20), r"length must be at least 4·pairs=32, got length=20"),
        (lambda: SelectiveCopy(length=16), "SelectiveCopy: length must be at least 17 for 8 tokens, got 16"),
        (lambda: SelectiveCopy(vocab_size=2), "SelectiveCopy: vocab_size must be at least 3"),
        (lambda: Passkey(length=40), "Passkey: length must be at least 79 for a key of 4 characters, got length=40"),
        (lambda: Needle(length=40), "Needle: length must be at least 57, got length=40"),
        (lambda: Passkey(reminders=-1), "Passkey: reminders must not be negative, got reminders=-1"),
        (lambda: Passkey(size=0), "Passkey: size must be at least 1, got size=0"),
    ],
)
def test_sizes_that_do_not_fit_are_named(make: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()


def test_byte_score_counts_the_training_text_for_the_bytes_it_is_shown(tmp_path: Path) -> None:
    (text := tmp_path / "a.txt").write_bytes(b"abcabcabdabc" * 40)
    parts = {split: ByteText(split, length=8, text=text) for split in ("train", "test")}
    score = ByteScore(text=text, order=1)
    for item in parts["test"]:
        score.process({"input_ids": [item["input_ids"]]}, [{"nats": 7 * np.log(2), "tokens": 7, "hits": 0}])
    expected = counted_bits(1, parts["train"].windows.ravel(), parts["test"].windows)
    for _ in range(2):  # bytes of one evaluation do not stay for the next
        found = score.compute_metrics(score.results)
        assert found["counted_bits"] == pytest.approx(expected)
        assert found["bits_per_token"] == pytest.approx(1)
        for item in parts["test"]:
            score.process({"input_ids": [item["input_ids"]]}, [])


def test_a_smaller_power_brings_a_key_back_sooner() -> None:
    means = []
    for power in (0.01, 1.0):
        items = [AssociativeRecall(power=power, pairs=2, length=64, size=60)[i]["labels"] for i in range(60)]
        means.append(float(torch.cat([(labels != IGNORED).nonzero() for labels in items]).float().mean()))
    assert means[0] < means[1] - 8


def test_a_stronger_belief_in_short_contexts_changes_the_bits() -> None:
    text, windows = np.frombuffer(b"abababac" * 8, np.uint8), np.frombuffer(b"ababacab", np.uint8)[None]
    assert counted_bits(2, text, windows, strength=50.0) > counted_bits(2, text, windows, strength=0.5)
