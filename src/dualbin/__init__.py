"""One-bit embedding tables for PyTorch and JAX."""

__version__ = "0.1.0"
