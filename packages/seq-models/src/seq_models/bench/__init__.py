"""Measurements of the models beside their peers."""
