"""Names of the files that verbs write."""

from pathlib import Path


def written_file(out: Path, picture: Path, text: str, reading: str) -> Path:
    """``<out>/<picture>_<words of the text>_<reading>`` without ending; the folder is made."""
    out.mkdir(parents=True, exist_ok=True)
    words = "_".join("".join(c if c.isalnum() else " " for c in text.lower()).split())[:40] or "prompt"
    return out / f"{picture.stem}_{words}_{reading}"
