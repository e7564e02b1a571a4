"""Texts that a model writes by itself: many rows at once, one token a step."""
