"""The digits world: scenes of handwritten digits, a model that learns to hallucinate on them, and its scores."""

from vlm_tools.digits.words import DIGITS, PAD, Words
from vlm_tools.digits.world import EvaluationScenes, Scene, TrainingScenes, scene

__all__ = ["DIGITS", "PAD", "EvaluationScenes", "Scene", "TrainingScenes", "Words", "scene"]
