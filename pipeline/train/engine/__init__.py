"""Engines spread a model over the ranks; the training loop knows only the interface in base.py.

Start at base.py, then zero.py and pipeline.py, the two over DeepSpeed (deepspeed_engine.py is what they share). A new
engine is a subclass of Engine, and build.py chooses it.
"""
