"""`plan`: estimates the memory and speed of a run's layouts on accelerators, without needing one.

Start at README.md and layouts.py, then memory.py and simulator.py. A new accelerator is an entry in pipeline/costs.py
and one in hardware.py.
"""
