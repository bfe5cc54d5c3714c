"""Where fine-tuned weights come from: trained here, files, or a hub; one file a kind, every kind an `Experts`."""
