"""Attention models for sequences, true to their papers."""
