"""Trust-region behavior blending for on-policy distillation, on verl and vLLM."""

__version__ = "0.1.0"
