"""GPT-2 124M on 10 billion tokens of FineWeb-Edu: the reproduction.

    python prepare_data.py fineweb_edu                                  # 20 GB of shards, hours
    torchrun --nproc_per_node=8 train.py config/gpt2_124m.py            # or python train.py on one GPU
    python train.py config/gpt2_124m.py --plan                          # what it takes, before the first step

BenchConfig and rates: the GPT-3 paper (table 2.1: 0.5M tokens a step, 6e-4, decay to a tenth), with a warm-up of 375M tokens.
Expect: validation loss at or under GPT-2's own 3.29 on this data after 19,073 steps; HellaSwag 0.294 (GPT-2: 0.2955; public
figures of the build-nanogpt project, not measured here: no machine of ours has run it yet).
"""

from configurator import Config

config = Config(
    dataset="fineweb_edu",
    vocab_multiple=128,
    batch_size=64,  # fits 80 GB
    tokens_per_step=524_288,
    max_steps=19_073,  # 10e9 tokens
    learning_rate=6e-4,
    min_lr=6e-5,
    warmup_steps=715,  # 375M tokens
    weight_decay=0.1,
    eval_interval=250,
    eval_tokens=10_485_760,
    checkpoint_interval=1000,
    hellaswag_interval=1000,
    sample_interval=250,
    sample_prompt="Hello, I'm a language model,",
)
