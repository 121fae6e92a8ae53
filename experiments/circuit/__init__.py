"""Circuits of written chains of thought: which heads make each word of the chain."""
