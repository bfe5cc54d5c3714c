"""The equations: pure functions and small frozen values on tensors, without files or names of parameters."""
