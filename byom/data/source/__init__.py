"""Sources of labelled examples: one file per kind, every kind a `Source`."""
