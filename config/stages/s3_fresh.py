"""Stage 3: a new batch at each step, in the order of the text.

    python train.py config/stages/s3_fresh.py

Hardware: 2 CPU cores, under a minute. Expect: loss about 6.5 at step 50 (results/amd-epyc-2-cores/stages.json): the model has
learned which tokens occur, hardly more.
"""

from dataclasses import replace

from config.stages.s2_overfit import config as previous

config = replace(previous, batch_order="sequential")
