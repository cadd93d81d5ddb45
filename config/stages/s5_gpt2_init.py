"""Stage 5: GPT-2's initialisation, with residual projections scaled by 1/sqrt(2 * n_layer).

    python train.py config/stages/s5_gpt2_init.py
    python bench.py stages                              # measure all stages, and the residual stream with and without scaling

Hardware: 2 CPU cores, under a minute. Expect: loss about 6.7 at step 50 (results/amd-epyc-2-cores/stages.json).
"""

from dataclasses import replace

from config.stages.s4_tied import config as previous

config = replace(previous, init="gpt2", scale_residual_init=True)
