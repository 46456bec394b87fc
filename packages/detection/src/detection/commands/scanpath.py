"""``detection shelves OUT`` writes shelves, ``detection scanpath SHELF.json`` says how they are searched."""

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Annotated, Any

import torch
import typer

from detection.package import PACKAGE


def write_shelves(
    out: Annotated[Path, typer.Argument(help="Folder to write to.")],
    split: Annotated[str, typer.Option(help="train, val or test.")] = "test",
    count: Annotated[int, typer.Option(help="How many shelves, from the first.")] = 4,
) -> Iterator[str]:
    """Write shelves of digits, with the path of the program that searched them, as json and PNG for ``scanpath``.

    Raises: ValueError for an unknown split or a count that it does not have.
    """
    from detection.scanpaths.shelves import SPLITS, DigitShelves, write_shelf

    if split not in SPLITS:
        raise ValueError(f"--split must be train, val or test, got {split}")
    if not 1 <= count <= SPLITS[split][2]:
        raise ValueError(f"--count must be 1…{SPLITS[split][2]} for split {split}, got {count}")
    shelves = DigitShelves(split)  # pyright: ignore[reportArgumentType]
    out.mkdir(parents=True, exist_ok=True)
    for index in range(count):
        file = out / f"{split}_{index}.json"
        write_shelf(shelves.shelf(index), file)
        yield str(file)


def scanpath(
    shelves: Annotated[list[Path], typer.Argument(help="Shelves, json files.", metavar="SHELF.json...")],
    run: Annotated[str | None, typer.Option(help="Run directory of a scanpath network (default: the newest).")] = None,
    out: Annotated[Path, typer.Option("--out", help="Where files are written.")] = Path("scanpaths"),
    samples: Annotated[int, typer.Option(help="Paths that are drawn at random beside the most likely one.")] = 0,
    seed: Annotated[int, typer.Option(help="Of the random paths.")] = 0,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda or cuda:<n>.")] = "auto",
) -> Iterator[str]:
    """Draw the order in which the objects of a shelf are looked at: ``<out>/<name>.png``, and all paths as json.

    A shelf is ``{"picture": "shelf.png", "rows": 3, "columns": 9, "target": 12}``; ``boxes`` of its objects (xyxy, row
    by row) and the ``path`` of somebody are read, too, and the latter is drawn below.

    Raises: ValueError for a run of something else, shelves of another size, and as `read_shelf`, before anything is
        written.
    """
    from attn_core.engine.run import open_run
    from detection.scanpaths.oat import OAT
    from detection.scanpaths.shelves import read_shelf

    if not 0 <= samples <= 1000:
        raise ValueError(f"--samples must be 0…1000, got {samples}")
    read = [read_shelf(file) for file in shelves]
    names = [file.stem for file in shelves]
    if twice := [name for name in names if names.count(name) > 1]:
        raise ValueError(f"two shelves are called {twice[0]}.json; give them names of their own")
    trained = open_run(PACKAGE, run, device=device)
    net: Any = getattr(trained.model, "net", None)
    if not isinstance(net, OAT):
        raise ValueError(f"{trained.directory}: not a run of a scanpath network, such as oat_shelves")
    for file, shelf in zip(shelves, read, strict=True):
        if (shelf.rows, shelf.columns) != (net.rows, net.columns):
            raise ValueError(
                f"{file}: the shelf has {shelf.rows} × {shelf.columns} objects, the network knows shelves of "
                f"{net.rows} × {net.columns}"
            )
    out.mkdir(parents=True, exist_ok=True)
    yield from _search(net, list(zip(names, read, strict=True)), out, samples, seed, trained.device)


@torch.inference_mode()
def _search(
    net: Any, shelves: Sequence[tuple[str, Any]], out: Path, samples: int, seed: int, device: torch.device
) -> Iterator[str]:
    """One line for each shelf."""
    from detection.pictures.fonts import counted
    from detection.pictures.scanpath import FIXATIONS, TRUTH, draw_path, stacked
    from detection.scanpaths.searchers import decode
    from detection.scanpaths.shelves import crops_of
    from detection.scanpaths.task import draw_paths

    for name, shelf in shelves:
        crops = crops_of(shelf, net.crop_size).unsqueeze(0).to(device)
        seen = net.encode(crops, torch.tensor([shelf.target], device=device))
        likely = decode(net, seen)[0]
        drawn = draw_paths(net, seen, samples, seed=seed)[0] if samples else []
        pages, titles = (
            [draw_path(shelf, likely)],
            [f"most likely: {counted(len(likely), *FIXATIONS)}, target {shelf.target}"],
        )
        for number, path in enumerate(drawn[:3], 1):
            pages.append(draw_path(shelf, path))
            titles.append(f"drawn {number} of {samples}: {counted(len(path), *FIXATIONS)}")
        if shelf.path:
            pages.append(draw_path(shelf, shelf.path, color=TRUTH))
            titles.append(f"recorded: {counted(len(shelf.path), *FIXATIONS)}")
        picture = out / f"{name}.png"
        stacked(pages, titles).save(picture)
        content = {"target": shelf.target, "likely": likely, "drawn": drawn}
        (out / f"{name}.json").write_text(json.dumps(content) + "\n", encoding="utf-8")
        yield f"{name}: {' → '.join(map(str, likely))} → {picture}"
