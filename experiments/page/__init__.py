"""What all studies found, on one page, from their results alone."""
