"""Attention layers and what they share, one file per paper or idea."""
