"""What every room stands on: errors and how a process ends, files that are whole or absent, downloads checked by sha256,
settings as checked dataclasses (and nanoGPT's names for them), scripts started in processes of their own, and what the
operating system tells about this machine. Standard library only (and filelock, which torch brings along, for the one lock), so
that every script starts as fast as Python does. What knows of tensors or tokens does not belong here.
"""
