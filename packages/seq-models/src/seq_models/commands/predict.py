"""``seq-models predict``: answers to files of points, or bits per byte of files of text."""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from attn_core.engine import TrainedRun
from seq_models.language.scoring import bits_per_byte
from seq_models.pointing.files import read_points
from seq_models.pointing.pictures import draw_answer
from seq_models.pointing.task import PointingTask, trimmed


def predict(run: TrainedRun, inputs: Sequence[Path], out: Path) -> Iterator[str]:
    """Of each file of points (two columns; .csv, .txt, .npy) the answer and ``<out>/<name>.png``; of each file of text
    its bits per byte.

    Raises:
        ValueError: a file without points or text, with other columns, or with numbers that are not finite.
    """
    files = [file for path in inputs for file in (sorted(path.iterdir()) if path.is_dir() else [path])]
    for file in files:
        if isinstance(run.model, PointingTask):
            points = read_points(file)
            low, high = points.amin(0), points.amax(0)
            unit = (points - low) / (high - low).max().clamp_min(1e-12)  # the square that the network was trained on
            net: Any = run.model.net
            found = net.decode(unit[None].to(run.device), constraint=run.model.constraint, beam=run.model.beam)
            answer = trimmed(found.pointers[0].tolist())
            out.mkdir(parents=True, exist_ok=True)
            draw_answer(picture := out / f"{file.stem}.png", run.data_info["task"], points, answer)
            yield f"{file}: {' '.join(map(str, answer))} (log p {float(found.log_prob):.3f}) → {picture}"
        else:
            bits, count = bits_per_byte(run, file.read_bytes(), str(file))
            yield f"{file}: {bits:.3f} bits per byte over {count:,} bytes"
