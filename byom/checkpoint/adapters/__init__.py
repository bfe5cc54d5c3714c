"""PEFT adapters: read as low-rank weights, and written."""
