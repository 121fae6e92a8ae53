"""Polynomial iteration in a CODI model: where states are read, which way inputs go, where the answer comes about."""
