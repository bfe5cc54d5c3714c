"""Faults planted one at a time, to see which of them the suite finds: ``python -m tests.mutants``."""
