"""Shared by the benchmarks: what is compared (case), how it is timed (measure), what is written (table), how it is
started (command)."""
