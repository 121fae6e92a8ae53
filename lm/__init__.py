"""Ordinary causal language models, in the open: blocks, batches, caches, hooks and the token loop. Knows no latents."""
