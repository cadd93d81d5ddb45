"""GPT-2 medium's shape (350M) on the same 10 billion tokens: peak learning rate 3e-4 (GPT-3 paper, table 2.1).

    torchrun --nproc_per_node=8 train.py config/gpt2_350m.py

Hardware: 80 GB GPUs. Not measured by us yet. Chinchilla's 20 tokens per parameter would be 7 billion tokens.
"""

from dataclasses import replace

from config.gpt2_124m import config as gpt2_124m

config = replace(gpt2_124m, n_layer=24, n_head=16, n_embd=1024, batch_size=32, learning_rate=3e-4, min_lr=3e-5)
