"""Distillation of a pipeline's self-attention into GSPN-2 blocks.

In the order in which a run passes them: `sources` of examples, `buckets` of sizes, the `cache` of
what the `teacher` makes of them, `batches` drawn from it, `noising`, `losses` of what `observe`
records, the `trainer` with its `checkpoints` and `log`, `validation`, the model `card`. `lora`
trains more than the blocks. ``examples/distill.py`` puts them together.
"""
