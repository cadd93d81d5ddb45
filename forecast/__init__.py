"""What can be known before a run and across runs: the memory, time and disk that a run will take (plan, memory, speed), the
loss it should have at each step (curve), and training on more GPUs than there are here (cluster, arithmetic alone). Nothing
here trains: what needs a step of training is passed in by train.py. What measures runs belongs in measure/.
"""
