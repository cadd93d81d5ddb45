"""Stage 5: GPT-2's initialisation, with residual projections scaled by 1/sqrt(2 * n_layer).

    python train.py config/stages/s5_gpt2_init.py        2 CPU cores: under a minute

Expect: loss about 6.8 at step 50. What the scaling does to the residual stream through the depth: `python bench.py stages`
measures it with and without, report.py draws it.
"""

from dataclasses import replace

from config.stages.s4_tied import config as previous

config = replace(previous, init="gpt2", scale_residual_init=True)
