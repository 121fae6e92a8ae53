"""Studies of single latents: necessity, transfer, anchors, early exit, probes, patching, principal components."""
