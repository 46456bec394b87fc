"""Weights from the Hugging Face hub, only when asked for by ``hf://``; everything else is a local path."""

from pathlib import Path

from attn_core.engine.errors import EngineError

_PREFIX = "hf://"


def local_file(source: str) -> Path:
    """A file for ``source``: a local path, or ``hf://owner/repo/path/in/repo[@revision]``, downloaded once and cached.

    Raises:
        EngineError: if the local path does not exist, or the hub cannot be reached and the file is not in its cache.
    """
    if not source.startswith(_PREFIX):
        path = Path(source).expanduser()
        if not path.exists():
            hint = f"; for the hub write {_PREFIX}{source}/<file>" if source.count("/") == 1 else ""
            raise EngineError(f"local_file: {source} does not exist{hint}")
        return path
    name, _, revision = source.removeprefix(_PREFIX).partition("@")
    parts = name.split("/")
    if len(parts) < 3:
        raise EngineError(f"local_file: expected {_PREFIX}owner/repo/file, got {source!r}")
    try:
        from huggingface_hub import hf_hub_download
        from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError
    except ImportError:
        raise EngineError("local_file: hub files need the package huggingface-hub; install the extra 'hub'") from None
    repo, file = "/".join(parts[:2]), "/".join(parts[2:])
    try:
        return Path(hf_hub_download(repo, file, revision=revision or None))
    except LocalEntryNotFoundError:
        raise EngineError(
            f"local_file: {source} is not in the local cache and the hub cannot be reached; connect to the internet "
            "once, or give the path of a file that you have"
        ) from None
    except (HfHubHTTPError, OSError, ValueError) as error:
        raise EngineError(f"local_file: {source}: {str(error).splitlines()[0]}") from None
