"""How often a model is right: options, the study, and accuracy with intervals."""
