"""Files of a run that may lie on the Hugging Face hub, in the words of the engine."""

from pathlib import Path

from attn_core import weights
from attn_core.engine.errors import EngineError


def local_file(source: str) -> Path:
    """`attn_core.weights.local_file`.

    Raises:
        EngineError: if the local path does not exist, or the hub cannot be reached and the file is not in its cache.
    """
    try:
        return weights.local_file(source)
    except ValueError as error:
        raise EngineError(str(error)) from None
