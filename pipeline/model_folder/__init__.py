"""Hugging Face model folders: `export` writes one from a checkpoint; resolve.py finds the model that a user names.

Start at export.py and convert.py. A new block needs its conversion there.
"""
