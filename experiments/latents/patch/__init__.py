"""Latents replaced by means, by values, by other prompts' latents or noise."""
