"""Microbenchmarks: `make bench` (python -m benchmarks) and `make gpu` write the tables of the README."""

import sys
from pathlib import Path

# `make gpu` runs with a Python into which nothing of this checkout has been installed.
sys.path.append(str(Path(__file__).resolve().parents[1] / "python"))
