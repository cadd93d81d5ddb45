"""GPT-2 large's shape (774M) on the same 10 billion tokens: peak learning rate 2.5e-4 (GPT-3 paper, table 2.1, 760M).

    torchrun --nproc_per_node=8 train.py config/gpt2_774m.py

Hardware: 80 GB GPUs. Not measured by us yet. Chinchilla's 20 tokens per parameter would be 15 billion tokens.
"""

from dataclasses import replace

from config.gpt2_124m import config as gpt2_124m

config = replace(gpt2_124m, n_layer=36, n_head=20, n_embd=1280, batch_size=16, learning_rate=2.5e-4, min_lr=2.5e-5)
