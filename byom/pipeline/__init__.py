"""From settings to a record: experts, statistics, tuning, merging, the variant, routing and evaluation."""
