"""Pictures of CSwin: those of the attention it hosts."""

from .mixing import panels

__all__ = ["panels"]
