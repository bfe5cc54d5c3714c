"""Figures: one file each, drawn from the numbers of a report."""
