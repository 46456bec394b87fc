"""The digits world at work: training of its LLaVA, its scores, and the comparison of methods on it."""
