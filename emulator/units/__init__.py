"""Execution units. Each module holds the emitters of its opcodes, and the functions that the emitted code calls.

A new unit is one module with `EMITTERS`, entered in hotloop.emulator.program. Refused, each with its line, are
bulk copies by the tensor memory accelerator and mbarriers (a unit beside async_copy, whose completions would end in
hotloop.emulator.copies and order warps by `Clocks.learn`), tcgen05 (a unit beside wgmma with a memory of its own), and
clusters (shared memory addressed by CTA in hotloop.emulator.shared).
"""
