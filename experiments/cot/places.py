"""Names of the files that one command writes and another reads. Free of torch and pandas."""

from __future__ import annotations

__all__ = ["CHOICE", "ITEMS", "SHUFFLED", "VECTOR", "WITHOUT"]

VECTOR = "vectors/all.safetensors"
"""The vector, in the folder of `codi cot derive`; beside it those without one family of sets, and the shuffled ones."""
WITHOUT = "vectors/without-{family}.safetensors"
SHUFFLED = "vectors/shuffled-{draw}.safetensors"
CHOICE = "choice.json"
"""What `codi cot grid` chose: way of steering -> layer and coefficient."""
ITEMS = "items.json"
"""Marks of the questions and clusters that a run used."""
