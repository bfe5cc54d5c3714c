"""Sources of fine-tuned weights: trained here, files, or a hub; one file per kind, every kind an `Experts`."""
