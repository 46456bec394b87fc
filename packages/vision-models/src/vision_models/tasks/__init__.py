"""Losses that a network asks for beyond cross-entropy, one task for each paper."""
