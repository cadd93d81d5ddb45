"""GPT-2 XL's shape (1.5B) on the same 10 billion tokens: peak learning rate 2e-4 (GPT-3 paper, table 2.1, 1.3B).

    torchrun --nproc_per_node=8 train.py config/gpt2_1558m.py                       # 80 GB GPUs
    torchrun --nproc_per_node=8 train.py config/gpt2_1558m.py --parallel=fsdp       # smaller ones

Not measured by us yet. Chinchilla's 20 tokens per parameter would be 31 billion tokens: --max_steps=59000.
"""

from dataclasses import replace

from config.gpt2_124m import config as gpt2_124m

config = replace(
    gpt2_124m, n_layer=48, n_head=25, n_embd=1600, batch_size=8, learning_rate=2e-4, min_lr=2e-5, compile_scope="block"
)
