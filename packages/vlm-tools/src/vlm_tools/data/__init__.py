"""Data of the built-in recipe: scenes of handwritten digits."""

from .digits_world import DIGITS, EvaluationScenes, Scene, TrainingScenes, scene
from .words import PAD, Words

__all__ = ["DIGITS", "PAD", "EvaluationScenes", "Scene", "TrainingScenes", "Words", "scene"]
