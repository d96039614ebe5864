"""Hugging Face model folders: `export` writes one from a checkpoint, and resolve.py finds the one that a user names.

Start at export.py and convert.py. A new block needs a conversion in convert.py.
"""
