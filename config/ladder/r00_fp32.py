"""Rung 0: GPT-2 124M written out plainly in float32: T x T scores in memory, 50257 columns, AdamW as a Python loop.

    python train.py config/ladder/r00_fp32.py
    python bench.py ladder                      time every rung

Every rung has the same tokens per step, sequence length and order of data, and so learns the same. bench.py sets the sizes to
fit the machine.
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
