"""Stage 2: one batch, learned by heart. Untied weights, PyTorch's default initialisation, plain AdamW: the starting point.

    python train.py config/stages/s2_overfit.py

Hardware: 2 CPU cores, under a minute. Expect: 163.04M parameters; loss 10.8-11.1 at step 1 and at most 0.005 at step 50
(results/amd-epyc-2-cores/stages.json).
"""

from configurator import Config

config = Config(
    dataset="shakespeare",
    batch_order="one_batch",
    tie_weights=False,
    init="pytorch",
    scale_residual_init=False,
    # 4 sequences of 32, torch.optim.AdamW's own betas and decay, nothing clipped, nothing scheduled
    sequence_length=32,
    batch_size=4,
    tokens_per_step=128,
    max_steps=50,
    learning_rate=3e-4,
    schedule="constant",
    warmup_steps=0,
    weight_decay=0.01,
    beta2=0.999,
    grad_clip=0.0,
    compile=False,  # 50 steps end before a compiler would
    log_interval=10,
    eval_tokens=4096,
)
