"""The rig of tests/faults.py: processes that are started, broken and judged, the runs they train, and the 33 faults."""
