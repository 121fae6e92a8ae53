"""Principal components of latents and cache entries; where each edit's effect goes."""
