"""The parts of the quality benchmark, benchmarks/quality.py. What its task "clicks" shares with an example lives in examples."""

import sys
from pathlib import Path

sys.path.append(str(Path(__file__).parents[2] / "examples"))
sys.path.append(str(Path(__file__).parents[2] / "examples" / "torch"))

import _flights as flights

__all__ = ["flights"]
