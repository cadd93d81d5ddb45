"""Rung 0: GPT-2 124M written out plainly in float32: the T x T scores in memory, 50257 columns, AdamW as a Python loop.

    python train.py config/ladder/r00_fp32.py

Tokens per step, sequence length and data order are the same on every rung, and so is what is learned; bench.py sets the sizes
to the machine (python bench.py ladder).
"""

from configurator import Config

config = Config(
    dataset="shakespeare",
    sequence_length=256,
    batch_size=4,
    tokens_per_step=1024,
    max_steps=50,
    warmup_steps=10,
    attention="naive",
    vocab_multiple=1,
    dtype="float32",
    fp32_precision="ieee",
    compile=False,
    fused_adamw=False,
    reuse_memory=False,
    prefetch=False,
)
