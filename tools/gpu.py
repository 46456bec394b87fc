"""What a GPU that is lent for fifteen minutes should tell about the kernels, in an order that survives a sudden end.

``PYTHONPATH=packages/attn-core/src:packages/vision-models/src python tools/gpu.py --out DIR`` runs five steps and
writes ``DIR/<step>.json`` after every result, so that nothing measured is lost: ``smoke`` (every kernel of every
operator against float64, in several processes), ``bits`` (two runs give equal bits), ``speed`` (the most telling cases
beside torch's own, with ceilings of the machine), ``models`` (networks beside timm), ``counters`` (kernels of the
slowest cases). ``--only speed counters`` goes on after a break. Needs torch, triton, timm, jaxtyping; no network.
"""

import argparse
import contextlib
import importlib
import itertools
import json
import multiprocessing
import os
import queue
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch

from attn_core.bench.case import OWN, BenchCase
from attn_core.bench.environment import environment
from attn_core.bench.measure import drawn, measure
from attn_core.bench.timing import in_turns
from attn_core.testing import TOLERANCE, Case, every_case, gradients, leaves, run
from attn_core.testing.harness import errors
from attn_core.testing.real_sizes import real_cases

STEPS = ("smoke", "bits", "speed", "models", "counters")
LIMITS = {"smoke": 180, "bits": 30, "speed": 300, "models": 180, "counters": 60}  # seconds
DTYPES = ("bfloat16", "float16", "float32")
CASE_SECONDS = 60  # a case that takes longer is counted as failed, its process replaced
# Operator → beginnings of names of the cases that tell most.
TELLING = {
    "attention": ("plain, 1024", "plain, 4096", "causal", "box bias, 1800", "position attention"),
    "block_attention": ("BiFormer", "HaloNet", "Swin windows"),
    "neighborhood_attention": ("NAT stage 1, 56", "DiNAT stage 1"),
    "linear_attention": ("lightning", "vision"),
    "group_attention": ("prompt of 2048", "length 2048"),
    "selective_scan": ("VMamba stage 1",),
    "linear_scan": ("gates of every", "Titans"),
    "deformable_attention": ("encoder", "decoder"),
    "channel_attention": ("DaViT-T stage 1, 56",),
    "focal_modulation": ("FocalNet-T (SRF) stage 1",),
    "additive_attention": ("",),
    "merge_attention": ("two parts",),
    "linear": ("stage 1 expand",),
}


class Report:
    """The file of a step: environment, then rows, written anew with every row."""

    def __init__(self, folder: Path, step: str, device: str) -> None:
        self.file = folder / f"{step}.json"
        self.held: dict[str, Any] = {"env": environment(device, torch.get_num_threads()), "rows": []}
        folder.mkdir(parents=True, exist_ok=True)

    def add(self, row: dict[str, Any]) -> None:
        """Keep a row and write the file."""
        self.held["rows"].append(row)
        beside = self.file.with_suffix(".writing")
        beside.write_text(json.dumps(self.held, indent=1, default=str) + "\n", encoding="utf-8")
        os.replace(beside, self.file)


def smoke_cases(device: str) -> list[Case]:
    """Small cases of every operator, and on a GPU cases of real sizes."""
    return every_case() + (real_cases() if device.startswith("cuda") else [])


def smoke(report: Report, device: str, seconds: float, *, processes: int, most: int | None) -> None:
    """Every case in every dtype, outputs and gradients against float64; no failure stops the others."""
    numbers = range(len(smoke_cases(device)))
    tasks: queue.Queue[tuple[int, str]] = queue.Queue()
    for task in itertools.islice(itertools.product(numbers, DTYPES), most):
        tasks.put(task)
    end, lock = time.monotonic() + seconds, threading.Lock()

    def supervise() -> None:
        """Feed one process after another: an illegal access leaves a process useless for what comes behind it."""
        context = multiprocessing.get_context("spawn")
        while not tasks.empty() and time.monotonic() < end:
            ours, theirs = context.Pipe()
            process = context.Process(target=_work, args=(theirs, device), daemon=True)
            process.start()
            theirs.close()
            with contextlib.suppress(queue.Empty, EOFError, OSError):
                ours.recv()  # it has imported everything
                while time.monotonic() < end:
                    task = tasks.get_nowait()
                    ours.send(task)
                    row = ours.recv() if ours.poll(CASE_SECONDS) else _lost(device, task, "took too long")
                    with lock:
                        report.add(row)
                    if row["lost"]:
                        break
            process.kill()
            process.join()

    threads = [threading.Thread(target=supervise) for _ in range(processes)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if left := tasks.qsize():
        report.add({"case": "", "note": f"time ran out, {left} cases were not run", "ok": False, "lost": False})


def _lost(device: str, task: tuple[int, str], why: str) -> dict[str, Any]:
    return {"case": str(smoke_cases(device)[task[0]]), "dtype": task[1], "ok": False, "note": why, "lost": True}


def _work(connection: Connection, device: str) -> None:
    """One process of `smoke`: answers tasks until its device is no longer usable."""
    torch.set_num_threads(1)
    cases = smoke_cases(device)
    _poison()
    connection.send("ready")
    while True:
        number, dtype = connection.recv()
        begin = time.monotonic()
        row = {"case": str(cases[number]), "dtype": dtype, **_judged(cases[number], getattr(torch, dtype), device)}
        connection.send(row | {"seconds": round(time.monotonic() - begin, 2)})
        if row["lost"]:
            return


def _judged(case: Case, dtype: torch.dtype, device: str) -> dict[str, Any]:
    """Errors of outputs and gradients over what the table allows."""
    table = TOLERANCE[dtype]
    try:
        found = [(error, table if name.startswith("output") else 2 * table, name) for name, error in
                 errors(case, dtype, "triton", device)]  # fmt: skip
        error, bound, where = max(found, key=lambda entry: entry[0] / entry[1])
    except Exception as problem:
        text = " ".join(str(problem).split())[:300]
        lost = any(word in text for word in ("CUDA error", "illegal", "launch failure", "misaligned"))
        return {"ok": False, "note": f"{type(problem).__name__}: {text}", "lost": lost}
    return {"ok": bool(error <= bound), "error": error, "bound": bound, "worst": where, "lost": False}


def _poison() -> None:
    """Fresh memory holds NaN. torch's own switch for that also forbids the kernels with atomic additions."""
    for owner, name in ((torch, "empty"), (torch, "empty_like"), (torch, "empty_strided"), (torch.Tensor, "new_empty")):
        original = getattr(owner, name)

        def poisoned(*args: Any, original: Callable[..., torch.Tensor] = original, **options: Any) -> torch.Tensor:
            fresh = original(*args, **options)
            return fresh.fill_(float("nan")) if fresh.is_floating_point() and not fresh.is_meta else fresh

        setattr(owner, name, poisoned)


def bits(report: Report, device: str, seconds: float, *, most: int | None) -> None:
    """Two runs of each case of real size, bfloat16: outputs and gradients must be equal to the bit."""
    end = time.monotonic() + seconds
    cases = real_cases() if device.startswith("cuda") else every_case()
    for case in cases[:most]:
        if time.monotonic() > end:
            report.add({"case": str(case), "equal": None, "note": "time ran out"})
            return
        try:
            runs = []
            for _ in range(2):
                args, options = case.inputs(torch.bfloat16, device)
                outputs = run(case, args, options, "triton")
                runs.append([*outputs, *gradients(outputs, leaves(args, options))])
            report.add({"case": str(case), "equal": all(map(torch.equal, *runs))})
        except Exception as problem:
            report.add({"case": str(case), "equal": None, "note": " ".join(str(problem).split())[:300]})


def ceilings(device: str, side: int = 8192) -> dict[str, float]:
    """Measured, not promised: GB/s of a copy, TFLOP/s of a product of square matrices in bfloat16."""
    side = side if device.startswith("cuda") else 256
    source, target = (torch.empty(side * side * 4, dtype=torch.uint8, device=device) for _ in range(2))
    a, b = (torch.randn(side, side, device=device, dtype=torch.bfloat16) for _ in range(2))
    measured = in_turns({"copy": lambda: target.copy_(source), "product": lambda: a @ b}, device=device, seconds=0.1)
    return {"gbs": 2 * source.nbytes / measured["copy"].ms / 1e6, "tflops": 2 * side**3 / measured["product"].ms / 1e9}


def telling_cases(device: str) -> Iterator[tuple[str, BenchCase]]:
    """Operator and case, in the order of TELLING."""
    for operator, beginnings in TELLING.items():
        listed = importlib.import_module(f"attn_core.bench.{operator}").cases(device, not device.startswith("cuda"))
        for beginning in beginnings:
            case = next((case for case in listed if case.name.startswith(beginning)), None)
            if case is not None:
                yield operator, case


def speed(report: Report, device: str, seconds: float, *, most: int | None) -> None:
    """Time, memory, error, share of the roofline and host time of our backends and the peers, bfloat16."""
    end = time.monotonic() + seconds
    most_of = ceilings(device)
    report.add({"ceilings": most_of})
    on_gpu = device.startswith("cuda")
    for operator, case in itertools.islice(telling_cases(device), most):
        if time.monotonic() > end:
            report.add({"op": operator, "case": case.name, "note": "time ran out"})
            continue
        try:
            for row in measure(operator, case, torch.bfloat16, device, seconds=0.05, quick=not on_gpu):
                if row["ms"] is not None:
                    floor = max(row["tflops"] / most_of["tflops"], row["gbs"] / most_of["gbs"])
                    row["share_of_roofline"] = round(floor, 3)
                    if row["provider"] in OWN and row["pass"] == "forward":
                        row["host_us"] = _host_microseconds(case, row["provider"], device)
                report.add(row)
        except Exception as problem:
            report.add({"op": operator, "case": case.name, "note": " ".join(str(problem).split())[:300]})


def _host_microseconds(case: BenchCase, provider: str, device: str, calls: int = 20) -> float:
    """What a call costs the CPU before it returns; the device works meanwhile."""
    call = case.providers[provider].prepare(drawn(case, torch.bfloat16, device))
    with torch.no_grad():
        call()
        if device.startswith("cuda"):
            torch.cuda.synchronize()
        begin = time.perf_counter()
        for _ in range(calls):
            call()
        spent = time.perf_counter() - begin
        if device.startswith("cuda"):
            torch.cuda.synchronize()
    return round(1e6 * spent / calls, 1)


def models(report: Report, device: str, seconds: float, *, names: Sequence[str]) -> None:
    """Networks beside timm's or the official formulation, eager and compiled."""
    from vision_models import create_model
    from vision_models.bench import biformer, timm_peer

    end = time.monotonic() + seconds
    for compiled, name in itertools.product((False, True), names):
        if time.monotonic() > end:
            report.add({"setting": name, "note": "time ran out"})
            continue
        try:
            torch.manual_seed(0)
            ours: Any = create_model(name).to(device)
            batch = 64 if device.startswith("cuda") else 1
            x = torch.randn(batch, *ours.default_cfg["input_size"], device=device)
            rows = biformer.rows if name.startswith(("biformer", "test_biformer")) else timm_peer.rows
            for row in rows(name, ours, x, compiled=compiled):
                report.add(row)
        except Exception as problem:
            report.add({"setting": name, "note": " ".join(str(problem).split())[:300]})


def counters(report: Report, device: str, folder: Path) -> None:
    """Kernels of the three cases that lie furthest below the roofline, by the profiler."""
    from torch.profiler import ProfilerActivity, profile

    try:
        rows = json.loads((folder / "speed.json").read_text(encoding="utf-8"))["rows"]
    except OSError:
        rows = []
    own = [row for row in rows if row.get("provider") == "triton" and row.get("share_of_roofline")]
    worst = {(row["op"], row["case"]) for row in sorted(own, key=lambda row: row["share_of_roofline"])[:3]}
    kinds = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if device.startswith("cuda") else [])]
    for operator, case in telling_cases(device):
        if (operator, case.name) not in worst:
            continue
        call = case.providers["triton"].prepare(drawn(case, torch.bfloat16, device))
        call()
        with profile(activities=kinds, profile_memory=True) as profiler:
            for _ in range(5):
                call()
        for event in sorted(profiler.key_averages(), key=lambda event: -event.self_device_time_total)[:12]:
            times = {"device_us": event.self_device_time_total / 5, "host_us": event.self_cpu_time_total / 5}
            report.add({"op": operator, "case": case.name, "kernel": event.key, "calls": event.count / 5, **times})


def summary(folder: Path) -> list[str]:
    """A line a step."""
    lines = []
    for step in STEPS:
        file = folder / f"{step}.json"
        rows = json.loads(file.read_text(encoding="utf-8"))["rows"] if file.exists() else None
        if rows is None:
            lines.append(f"{step}: not run")
        elif step == "smoke":
            bad = [f"{row['case']} {row.get('dtype', '')}" for row in rows if not row["ok"]]
            lines.append(
                f"smoke: {len(rows) - len(bad)} right, {len(bad)} wrong" + "".join(f"\n  {b}" for b in bad[:20])
            )
        elif step == "bits":
            bad = [row["case"] for row in rows if row["equal"] is not True]
            lines.append(f"bits: {len(rows) - len(bad)} equal, {len(bad)} not: {', '.join(bad)}")
        else:
            lines.append(f"{step}: {len(rows)} rows")
    return lines


def main() -> int:
    """Run the steps that the arguments name and write one JSON file for each."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder for the JSON files")
    parser.add_argument("--only", nargs="+", choices=STEPS, default=STEPS, help="these steps (default: all)")
    parser.add_argument("--device", default="cuda", help="cuda, or cpu with TRITON_INTERPRET=1 to try the script")
    parser.add_argument("--processes", type=int, default=os.cpu_count(), help="of the smoke step")
    parser.add_argument("--most", type=int, help="at most so many cases a step")
    parser.add_argument("--models", nargs="+", default=("biformer_tiny", "davit_tiny", "halonet26t"), help="networks")
    arguments = parser.parse_args()
    if arguments.device.startswith("cuda") and not torch.cuda.is_available():
        parser.error("--device cuda: torch sees no GPU; TRITON_INTERPRET=1 … --device cpu tries the script")
    device, most = arguments.device, arguments.most
    steps: dict[str, Callable[[Report, float], None]] = {
        "smoke": lambda to, s: smoke(to, device, s, processes=arguments.processes or 1, most=most),
        "bits": lambda to, s: bits(to, device, s, most=most),
        "speed": lambda to, s: speed(to, device, s, most=most),
        "models": lambda to, s: models(to, device, s, names=arguments.models),
        "counters": lambda to, _: counters(to, device, arguments.out),
    }
    for step in arguments.only:
        begin = time.monotonic()
        steps[step](Report(arguments.out, step, device), LIMITS[step])
        print(f"== {step}: {time.monotonic() - begin:.0f} s", flush=True)
    print("\n".join(summary(arguments.out)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
