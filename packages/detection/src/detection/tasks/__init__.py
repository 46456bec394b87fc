"""Losses and predictions of detectors, for the engine."""
