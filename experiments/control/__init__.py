"""`codi control`: control vectors by representation engineering on ordinary language models."""
