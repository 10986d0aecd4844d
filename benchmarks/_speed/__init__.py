"""The parts of the speed benchmark, benchmarks/speed.py."""
