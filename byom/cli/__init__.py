"""The command line and Hydra: the only package that imports `hydra` and `omegaconf`."""
