"""Data of the built-in recipe: scenes of handwritten digits."""

from vlm_tools.data.digits_world import EvaluationScenes, Scene, TrainingScenes, scene
from vlm_tools.data.words import DIGITS, PAD, Words

__all__ = ["DIGITS", "PAD", "EvaluationScenes", "Scene", "TrainingScenes", "Words", "scene"]
