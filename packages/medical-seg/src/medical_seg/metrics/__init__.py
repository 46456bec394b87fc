"""Dice in training, and the scores of ``evaluate``."""
