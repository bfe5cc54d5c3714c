"""Statistics of a fine-tuned model on its task's data: one file each. Some merge methods cannot work without."""
