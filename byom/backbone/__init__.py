"""Backbones: one file each. A backbone turns raw inputs into features and makes frozen heads."""
