"""Edits of latents on a grid of pairs, positions and coefficients: what is tried, a part of it, its trials and cells.

Shared by every study that steers along differences of latents; knows nothing about options, run folders or figures.
"""
