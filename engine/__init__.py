"""What every script that runs a model stands on: the run's objects and build() that makes them (run), the device and what
is available on it (machine), several processes (parallel), checkpoints (checkpoint, restore), weights from elsewhere
(pretrained), the run's folder and its journal, a check that every setting is really on (effective), and losses that stand
out (outliers). The training step and its loop are not here but in train.py; surviving faults is safety/, timing is
measure/, and the mathematics is model.py.
"""
