"""Figures: one style, one palette, one way to save; lines with intervals (series.py) and heat maps (heatmap.py).

A study calculates first and draws second: its figure module takes tables and gives figures, `style.save` makes the
files. Only this package and the figure modules of the rooms touch matplotlib, and only when something is drawn.
"""
