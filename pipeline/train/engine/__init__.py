"""Engines run a model over several ranks; the training loop uses only the interface in base.py.

Start at base.py, then zero.py and pipeline.py, the two engines over DeepSpeed; deepspeed_engine.py is their common base
class. A new engine is a subclass of Engine that build.py chooses.
"""
