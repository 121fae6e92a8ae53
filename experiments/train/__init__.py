"""Training of CODI models: options and presets, the model, its data, one stage, and the whole run."""
