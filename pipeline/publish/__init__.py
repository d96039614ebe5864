"""`publish`: assemble.py puts a model folder and its results together, push.py sends them to a hub."""
