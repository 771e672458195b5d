"""Execution units. Each module holds the emitters of its opcodes, and the functions that the emitted code calls."""
