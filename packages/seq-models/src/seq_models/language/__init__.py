"""Language models: their common ground, one file per paper, their task and its scores."""
