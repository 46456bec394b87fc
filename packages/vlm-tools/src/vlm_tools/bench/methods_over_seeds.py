"""What methods do on the digits world, over seeds of its training and numbers of threads.

``python -m vlm_tools.bench.methods_over_seeds --seeds 5 --threads 1 2 --json FILE`` trains one model for each seed and
number of threads (minutes each; begun ones are continued), tests every method on the same 200 scenes, and prints how
often each of them lowers and raises CHAIR_s. The number of threads alone changes the last bits of sums, hence the
weights, hence what methods do: it counts as another draw. Pairs that the file holds are not measured again.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
from collections.abc import Iterator, Sequence
from datetime import date
from pathlib import Path
from typing import Any

import torch

from attn_core.engine.run import open_run
from attn_core.engine.train import TrainOptions, train
from vlm_tools.data.digits_world import EvaluationScenes
from vlm_tools.digits.demo import HELD_OUT, compare
from vlm_tools.package import PACKAGE

Rows = list[dict[str, Any]]


def measure(seed: int, threads: int, runs: Path, scenes: int) -> Rows:
    """One row for each method on the model of one seed; trained in this process if there is none."""
    torch.set_num_threads(threads)
    run = runs / f"threads_{threads}" / f"seed_{seed}"
    if not (run / "result.json").is_file():
        begun = (run / "config.py").is_file()
        train(PACKAGE, TrainOptions(out=run, resume=begun, seed=None if begun else seed, device="cpu"))
    model: Any = open_run(PACKAGE, run, device="cpu").model
    where = {"scenes": scenes, "torch": torch.__version__, "cpu": torch.backends.cpu.get_cpu_capability(),
             "date": date.today().isoformat()}  # fmt: skip
    data = EvaluationScenes("test", scenes, start=HELD_OUT)
    return [{"seed": seed, "threads": threads, **row, **where} for row in compare(model.net.eval(), data)]


def summary(rows: Rows) -> Iterator[str]:
    """For each method how often CHAIR_s falls and rises against the same model as it is, and by how much."""
    pairs = sorted({(row["threads"], row["seed"]) for row in rows})
    base = {(row["threads"], row["seed"]): row["chair_s"] for row in rows if row["method"] == "baseline"}
    yield f"{len(pairs)} models (threads, seed): {', '.join(f'({t}, {s})' for t, s in pairs)}"
    for name in dict.fromkeys(row["method"] for row in rows if "chair_s" in row):
        changes = [row["chair_s"] - base[row["threads"], row["seed"]] for row in rows if row["method"] == name]
        lower, higher = sum(c < 0 for c in changes), sum(c > 0 for c in changes)
        yield (f"{name}: lower in {lower}, higher in {higher} of {len(changes)}; change {min(changes):+.3f} … "
               f"{max(changes):+.3f}, mean {statistics.mean(changes):+.3f}")  # fmt: skip


def main(arguments: Sequence[str] | None = None) -> None:
    """Entry point of the command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=5, help="seeds 0 … SEEDS - 1")
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2], help="numbers of threads")
    parser.add_argument("--runs", type=Path, default=Path("runs/methods_over_seeds"), help="where runs are kept")
    parser.add_argument("--scenes", type=int, default=200, help="held-out scenes")
    parser.add_argument("--json", type=Path, default=Path("methods_over_seeds.json"), help="rows measured so far")
    parser.add_argument("--finished", action="store_true", help="only models that are trained already")
    parser.add_argument("--one", type=int, nargs=2, metavar=("SEED", "THREADS"), help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if options.one is not None:
        seed, threads = options.one
        print(json.dumps(measure(seed, threads, options.runs, options.scenes)))
        return
    rows: Rows = json.loads(options.json.read_text(encoding="utf-8")) if options.json.is_file() else []
    for threads in options.threads:
        for seed in range(options.seeds):
            trained = (options.runs / f"threads_{threads}" / f"seed_{seed}" / "result.json").is_file()
            measured = any((row["seed"], row["threads"]) == (seed, threads) for row in rows)
            if measured or (options.finished and not trained):
                continue
            rows += _in_a_process(seed, threads, options)
            options.json.parent.mkdir(parents=True, exist_ok=True)
            options.json.write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")
    for line in summary(rows):
        print(line)


def _in_a_process(seed: int, threads: int, options: argparse.Namespace) -> Rows:
    """Rows of one model; a process of its own, since a process keeps the threads that it began with."""
    command = [sys.executable, "-m", __spec__.name, "--one", str(seed), str(threads), "--runs", str(options.runs),
               "--scenes", str(options.scenes)]  # fmt: skip
    environment = {**os.environ, "OMP_NUM_THREADS": str(threads), "MKL_NUM_THREADS": str(threads)}
    done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, check=True, encoding="utf-8")
    return json.loads(done.stdout.splitlines()[-1])


if __name__ == "__main__":
    main()
