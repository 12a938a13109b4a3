"""Microbenchmarks: `make bench` (python -m benchmarks) runs them all and writes the tables of the README."""
