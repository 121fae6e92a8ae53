"""The steering sweep: what is tried, the run, its statistics, figures and summary."""
