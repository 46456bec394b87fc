"""Pins of every third-party package in the workspace: ``[tool.uv] constraint-dependencies`` of the root pyproject.toml.

``python tools/pins.py`` writes what ``uv export`` resolves, for all extras, groups, platforms and Python versions;
``--upgrade`` looks for newer versions first; ``--check`` changes nothing and exits with 1 if a resolved package is
unpinned or a pin is stale.
"""

import argparse
import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PYPROJECT = ROOT / "pyproject.toml"
BLOCK = re.compile(r"^constraint-dependencies = \[\n(?:    .*\n)*\]\n", re.MULTILINE)


def resolved(*options: str) -> list[str]:
    """Requirements with ``==`` and markers, sorted by name, of everything that the workspace can install."""
    command = ["uv", "export", "--all-packages", "--all-extras", "--all-groups", "--no-emit-workspace"]
    command += ["--no-hashes", "--no-annotate", "--no-header", "--quiet", *options]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, encoding="utf-8", check=False)
    if done.returncode:
        raise SystemExit(f"pins: uv export failed:\n{done.stderr.strip()}")
    lines = {line.strip() for line in done.stdout.splitlines() if line.strip()}
    unpinned = sorted(line for line in lines if "==" not in line.partition(";")[0])
    if unpinned:
        raise SystemExit(f"pins: resolved without a version: {', '.join(unpinned)}")
    return sorted(lines)


def with_pins(text: str, pins: list[str]) -> str:
    """The text of pyproject.toml with ``pins`` in the place of its own; without any if ``pins`` is empty."""
    block = "constraint-dependencies = [\n" + "".join(f'    "{pin}",\n' for pin in pins) + "]\n" if pins else ""
    if BLOCK.search(text):
        return BLOCK.sub(lambda _: block, text)
    return text.replace("[tool.uv]\npackage = false\n", f"[tool.uv]\npackage = false\n{block}", 1)


def pinned(text: str) -> list[str]:
    """The pins that stand in the text of pyproject.toml."""
    found = BLOCK.search(text)
    return re.findall(r'^    "(.*)",$', found.group(), re.MULTILINE) if found else []


def main() -> int:
    """Write the pins, or with ``--check`` compare; 1 if one is missing or too many, else 0."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    action = parser.add_mutually_exclusive_group()
    action.add_argument("--check", action="store_true", help="compare, change nothing")
    action.add_argument("--upgrade", action="store_true", help="drop the pins, resolve anew, write what comes out")
    arguments = parser.parse_args()
    text = PYPROJECT.read_text(encoding="utf-8")
    if arguments.check:
        wanted, present = set(resolved()), set(pinned(text))
        for what, pins in (("not pinned", wanted - present), ("pinned, but nothing needs it", present - wanted)):
            for pin in sorted(pins):
                print(f"pins: {what}: {pin}", file=sys.stderr)
        if wanted != present:
            print("pins: run python tools/pins.py", file=sys.stderr)
            return 1
        print(f"{len(present)} pins are those that uv resolves")
        return 0
    if arguments.upgrade:
        PYPROJECT.write_text(with_pins(text, []), encoding="utf-8")
    try:
        pins = resolved(*(["--upgrade"] if arguments.upgrade else []))
    except SystemExit:
        PYPROJECT.write_text(text, encoding="utf-8")
        raise
    PYPROJECT.write_text(with_pins(text, pins), encoding="utf-8")
    print(f"wrote {len(pins)} pins")
    return 0


if __name__ == "__main__":
    sys.exit(main())
