"""GPT-2 124M on OpenWebText as nanoGPT trains it: no biases, 491,520 tokens a step, 600,000 steps.

    python prepare_data.py openwebtext                                  # 18 GB of shards
    torchrun --nproc_per_node=8 train.py config/openwebtext_124m.py

Hardware: 8 GPUs for days. Expect: validation loss about 2.85 (nanoGPT's README; GPT-2's own weights have 3.12 on it). Not
measured by us yet.
"""

from configurator import Config

config = Config(
    dataset="openwebtext",
    vocab_multiple=128,
    bias=False,
    batch_size=12,
    tokens_per_step=491_520,
    max_steps=600_000,
    learning_rate=6e-4,
    min_lr=6e-5,
    warmup_steps=2000,
    eval_interval=1000,
    eval_tokens=2_457_600,
    checkpoint_interval=1000,
)
