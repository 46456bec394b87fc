"""Whether explanations agree, whether they are faithful, and, where the truth is known, whether they point at it."""
