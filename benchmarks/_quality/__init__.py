"""The parts of the quality benchmark, benchmarks/quality.py."""
