"""Characters of tiny Shakespeare with a 0.8M-parameter GPT: a minute or two on a CPU.

    python prepare_data.py shakespeare_char
    python train.py config/shakespeare_char_cpu.py

Hardware: 2 CPU cores. Expect: the sizes are nanoGPT's for a CPU, which reach a validation loss of 1.88 there (its README).
"""

from dataclasses import replace

from config.shakespeare_char import config as larger

config = replace(
    larger,
    n_layer=4,
    n_head=4,
    n_embd=128,
    block_size=64,
    dropout=0.0,
    batch_size=12,
    tokens_per_step=12 * 64,
    max_steps=2000,
    log_interval=100,
)
