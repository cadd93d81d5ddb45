"""Measuring: how long train.train_step takes, whether the ladder's settings change nothing but that, where the time goes, how
fast a model decodes, what whole runs reach, and how the loss scales with parameters and tokens. Everything here calls the
product's own functions, never a copy of them, and times training steps in fresh processes; it leaves raw numbers as JSON. What
turns those into tables and statistics belongs in report/; predictions that measure nothing belong in forecast/.
"""
