"""Pictures of Swin: those of the attention it hosts."""

from vision_models.pictures.explain.mixing import panels

__all__ = ["panels"]
