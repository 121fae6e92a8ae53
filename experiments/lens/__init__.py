"""Logit lens and tuned lens on latents: training, reading, detection, transfer, causal checks."""
