"""The tables, figures and page of BYOM-LoRA: python -m experiments.lora."""
