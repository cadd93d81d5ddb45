"""GPT-2 124M on 10 billion tokens of FineWeb-Edu.

    python prepare_data.py fineweb_edu                                  # 20 GB of shards, hours
    python train.py config/gpt2_124m.py --plan                          # memory, time and disk, before the first step
    torchrun --nproc_per_node=8 train.py config/gpt2_124m.py            # or python train.py on one GPU

Hardware: 80 GB GPUs; smaller ones with a smaller --batch_size. Sizes and rates are the GPT-3 paper's (table 2.1: 0.5M tokens a
step, 6e-4, decay to a tenth), with a warm-up of 375M tokens.
Expect: after 19,073 steps a validation loss at or under that of OpenAI's GPT-2 (gpt2_124m.curve.json holds it with its source,
and the log compares). HellaSwag 0.294, GPT-2 itself 0.2955, by the build-nanogpt project. Not measured by us yet.
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
