"""Hallucination benchmarks: questions, scores, and what a difference is worth."""
