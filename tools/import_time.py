"""How much longer ``import attn_core`` takes than ``import torch``: ratio of medians over interleaved fresh processes.

``python tools/import_time.py [--rounds 7]``; exit code 1 if the ratio is above 1.2. For a quiet machine: no test.
"""

import argparse
import statistics
import subprocess
import sys
import time

LIMIT = 1.2


def seconds(statement: str) -> float:
    start = time.perf_counter()
    subprocess.run([sys.executable, "-c", statement], check=True)
    return time.perf_counter() - start


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=7)
    rounds = parser.parse_args().rounds
    statements = ("import torch", "import attn_core")
    for statement in statements:  # byte code and the disk cache
        seconds(statement)
    measured = [[seconds(statement) for statement in statements] for _ in range(rounds)]
    torch_seconds, ours = (statistics.median(column) for column in zip(*measured, strict=True))
    print(f"import torch {torch_seconds:.2f} s, import attn_core {ours:.2f} s, ratio {ours / torch_seconds:.2f}")
    return 1 if ours > LIMIT * torch_seconds else 0


if __name__ == "__main__":
    sys.exit(main())
