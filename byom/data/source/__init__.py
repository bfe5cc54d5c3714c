"""Where labelled examples come from: one file a kind, every kind a `Source`."""
