"""Recipes of fine-tuning: `base.py`, the loop, and one file a recipe."""
