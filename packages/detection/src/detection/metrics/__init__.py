"""Metrics of detection."""
