"""Export Mixture-of-Experts GGUF models with binary expert weights."""

__version__ = "0.1.0"
