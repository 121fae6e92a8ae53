"""Looking at what a run folder holds: the summary of any study, and single answers of a sweep."""
