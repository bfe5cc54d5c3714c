"""Write the tables, figures and page of BYOM-LoRA: python -m experiments.lora."""

from experiments.lora.page import main

main()
