"""Statistics of every study: arrays and frames in, arrays and frames out; no files, no models, no names of a study."""
