"""Damaged and hostile checkpoints, made by changing valid ones where their structure is: ``python -m tests.fuzz``."""
