"""GPT-2's own weights, fine-tuned on tiny Shakespeare for twenty steps.

    python prepare_data.py shakespeare && python train.py config/finetune_shakespeare.py
    python train.py config/finetune_shakespeare.py --init_from=path/to/gpt2        # without a connection to the hub

Hardware: one GPU, or a CPU with patience. Not measured yet; tested with a small model in the same layout.
"""

from configurator import Config

config = Config(
    dataset="shakespeare",
    init_from="gpt2",
    vocab_multiple=128,
    batch_size=4,
    tokens_per_step=32_768,
    max_steps=20,
    learning_rate=3e-5,
    min_lr=3e-5,
    schedule="constant",
    warmup_steps=0,
    eval_interval=5,
    eval_tokens=32_768,
    sample_interval=10,
    sample_prompt="ROMEO:",
)
