"""A 5M-parameter GPT on enwik8 (the first 100 MB of Wikipedia's XML) with its own BPE: bits per byte in minutes.

    python prepare_data.py enwik8 --tokenizer=bpe --vocab_size=8192
    python train.py config/enwik8.py

Hardware: 2 CPU cores. Expect: the losses and times of results/amd-epyc-2-cores/run_enwik8.json. The run sees a part of the text
once, so it stays far from published results. The split is the usual one: 90, 5 and 5 million bytes.
"""

from configurator import Config

config = Config(
    dataset="enwik8",
    vocab_size=8192,
    n_layer=4,
    n_head=4,
    n_embd=256,
    block_size=256,
    attention="blocked",
    batch_size=16,
    tokens_per_step=8192,
    max_steps=400,
    learning_rate=2e-3,
    min_lr=2e-4,
    warmup_steps=30,
    eval_interval=50,
    eval_tokens=65_536,
    checkpoint_interval=200,
    sample_interval=100,
    sample_prompt="The history of ",
)
