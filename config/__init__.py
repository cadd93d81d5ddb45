"""Runnable configurations: each file holds a docstring (command, hardware, what to expect) and one `config`."""
