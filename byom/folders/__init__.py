"""From folders to a folder: a base and fine-tuned models are read, merged or packed, and written for other tools."""
