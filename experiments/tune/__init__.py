"""A LoRA adapter for a language model that writes a chain when asked for steps and answers at once otherwise."""
