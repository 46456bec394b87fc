"""``vlm-tools agree``: whether readings agree, are faithful, and point at the truth where it is known."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any

import typer

from vlm_tools.commands.options import Device, Model, Tokens, check_reading
from vlm_tools.readings.names import READINGS


def agree(
    picture: Annotated[Path | None, typer.Argument(help="Picture file; without one, digits-world scenes.")] = None,
    prompt: Annotated[str, typer.Argument(help="Question or instruction.")] = "describe the image .",
    model: Model = None,
    reading: Annotated[
        list[str] | None, typer.Option("--reading", help=f"Repeatable; all by default: {', '.join(READINGS)}.")
    ] = None,
    k: Annotated[int, typer.Option("-k", "--top-k", help="Of top-k Kendall.", min=1)] = 5,
    steps: Annotated[int, typer.Option(help="Of deletion and insertion; 0: none.", min=0, max=1000)] = 8,
    permutations: Annotated[int, typer.Option(help="For the chance of each number.", min=1)] = 200,
    scenes: Annotated[int, typer.Option(help="Held-out scenes, without a picture.", min=1, max=5000)] = 50,
    out: Annotated[Path | None, typer.Option("--out", help="Json file for the numbers.")] = None,
    tokens: Tokens = 32,
    device: Device = "auto",
) -> Iterator[str]:
    """Whether readings agree more than by chance, are faithful to the model, and (digits world) hit the truth."""
    from vlm_tools.models.session import open_session, read_picture

    chosen: list[Any] = list(dict.fromkeys(reading or READINGS))
    for name in chosen:
        check_reading(name)
    if len(chosen) < 2:
        raise ValueError(f"--reading {chosen[0]}: agreement needs two readings or more")
    shown = None if picture is None else read_picture(picture)
    session = open_session(model, device=device)
    if shown is not None:
        found = _of_answer(session, shown, prompt, chosen, k, steps, permutations, tokens)
    elif session.processor is not None:
        raise ValueError("without a picture the digits world is read, for which --model must be one of its runs; "
                         "name a picture")  # fmt: skip
    else:
        from vlm_tools.data.digits_world import EvaluationScenes
        from vlm_tools.digits.agreement import agreement_of_readings
        from vlm_tools.digits.demo import HELD_OUT

        data = EvaluationScenes("test", scenes, start=HELD_OUT)
        found = agreement_of_readings(session.model, data, chosen, k=k, steps=steps, permutations=permutations)
    yield from found.lines()
    if out is not None:
        out.parent.mkdir(parents=True, exist_ok=True)
        out.write_text(json.dumps(found.row(), indent=1) + "\n", encoding="utf-8")
        yield f"wrote {out}"


def _of_answer(
    session: Any, shown: Any, prompt: str, chosen: list[Any], k: int, steps: int, permutations: int, tokens: int
) -> Any:
    """Over the words of the model's answer."""
    from vlm_tools.agreement.compare import areas, compare, mean_areas
    from vlm_tools.readings.explain import explain, with_answer

    inputs = session.prepare(shown, prompt)
    answer = session.answer(inputs, tokens)
    whole = with_answer(inputs, answer)
    first = inputs["input_ids"].shape[1]
    said = answer[0].tolist()
    rows = [first - 1 + number for number, word in enumerate(session.words(said)) if word.strip()]
    if not rows:
        raise ValueError("the answer has no word that could be explained; ask something else")
    targets = [said[row - first + 1] for row in rows]
    maps = {name: explain(session.model, whole, rows, targets, reading=name).detach().float().cpu() for name in chosen}
    found = compare(maps, k=k, permutations=permutations)
    if steps:
        found.areas = mean_areas([
            areas(session.model, whole, row, targets[n], {name: heat[n] for name, heat in maps.items()}, steps=steps,
                  seed=n)
            for n, row in enumerate(rows)
        ])  # fmt: skip
    return found
