"""Do even latents store and odd latents compute? Measures, verdict, claims about single latents."""
