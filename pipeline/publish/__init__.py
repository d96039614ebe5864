"""The command `publish`: assemble.py combines a model folder with its results, push.py uploads them to a hub."""
