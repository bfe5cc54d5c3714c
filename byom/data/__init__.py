"""Tasks and suites, and the sources of their labelled examples."""
