"""Weights that a run starts from: in checkpoints, and in Hugging Face folders, read by fragments.

Start at start.py; folder_settings.py and folder_reader.py are also how a model folder is loaded.
"""
