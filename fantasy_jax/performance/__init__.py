"""Cost of programs: operation counts, AOT compilation for TPU topologies, and timings."""
