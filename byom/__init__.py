"""byom: build your own multi-task model."""
