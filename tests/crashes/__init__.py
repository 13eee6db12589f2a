"""Writers killed at random moments: `python -m tests.crashes` from the repository's root.

harness.py      forks, kills, starts again, compares
operations.py   what is killed: one entry of OPERATIONS each
"""
