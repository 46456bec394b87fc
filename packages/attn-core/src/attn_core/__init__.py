"""Fused attention operators: one function per operator, three backends each."""
