"""Data of the built-in recipe: scenes of handwritten digits."""

from .digits_world import EvaluationScenes, Scene, TrainingScenes, scene
from .words import DIGITS, PAD, Words

__all__ = ["DIGITS", "PAD", "EvaluationScenes", "Scene", "TrainingScenes", "Words", "scene"]
