"""`plan`: which layouts of a run fit a number of accelerators, and how fast each would be, without any.

Start at layouts.py, then memory.py and simulator.py. A new accelerator is an entry in pipeline/costs.py, with what the
simulator knows of it in hardware.py.
"""
