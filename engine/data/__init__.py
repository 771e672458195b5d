"""Documents in, packed batches out.

files.py       paths -> files: what is read, what is passed over and why
documents.py   files -> documents: text in segments, every problem counted with its place
tokenizer.py   train or load a tokenizer; documents -> token ids
prepare.py     the pipeline: duplicates, split, tokenizer, shards, manifest; `hotloop prepare`
shards.py      the stored corpus: memory-mapped, headered, checked
packing.py     which pieces of documents share a sequence: planned once, kept beside the shards
order.py       (seed, step) -> which packs
batches.py     (seed, step, rank) -> tensors, assembled ahead of the step
evaluation.py  held-out documents -> tensors, every token scored once
"""
