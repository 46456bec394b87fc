"""``seq-models predict``: answers to files of points, or bits per byte of files of text."""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from attn_core.engine import TrainedRun
from attn_core.engine.inputs import PredictionTable, find_inputs


def predict(run: TrainedRun, inputs: Sequence[Path], out: Path) -> Iterator[str]:
    """Answers to files of points with a picture of each, or bits per byte of files of text; all of them as a table.

    Points are two columns (.csv, .txt, .npy); folders are searched at any depth, and results mirror their tree.

    Raises:
        ValueError: no files; a file without points or text, with other columns, or with numbers that are not finite.
    """
    from seq_models.pointing.task import PointingTask

    return _point(run, inputs, out) if isinstance(run.model, PointingTask) else _score(run, inputs, out)


def _point(run: TrainedRun, inputs: Sequence[Path], out: Path) -> Iterator[str]:
    from seq_models.pointing.files import POINT_SUFFIXES, in_unit_square, read_points
    from seq_models.pointing.pictures import draw_answer
    from seq_models.pointing.task import trimmed

    model: Any = run.model
    files = find_inputs(inputs, POINT_SUFFIXES, what="files of points", out=out)
    with PredictionTable(out) as table:
        for file in files:
            points = read_points(file.path)
            unit = in_unit_square(points)[None].to(run.device)
            found = model.net.decode(unit, constraint=model.constraint, beam=model.beam)
            answer, log_prob = trimmed(found.pointers[0].tolist()), float(found.log_prob)
            draw_answer(picture := file.output(out, ".png"), run.data_info["task"], points, answer)
            table.add(file, answer=answer, log_prob=log_prob)
            yield f"{file.path}: {' '.join(map(str, answer))} (log p {log_prob:.3f}) → {picture}"


def _score(run: TrainedRun, inputs: Sequence[Path], out: Path) -> Iterator[str]:
    from seq_models.data.documents import TEXT_SUFFIXES, documents
    from seq_models.language.scoring import bits_per_byte

    files = find_inputs(inputs, TEXT_SUFFIXES, what="files of text", out=out)
    with PredictionTable(out) as table:
        for file in files:
            bits, count = bits_per_byte(run, b"".join(documents([file.path])), str(file.path))
            table.add(file, bits_per_byte=bits, bytes=count)
            yield f"{file.path}: {bits:.3f} bits per byte over {count:,} bytes"
