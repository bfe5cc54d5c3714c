"""From records to tables and figures, without models and without Hydra."""
