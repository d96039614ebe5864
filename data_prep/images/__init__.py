"""Encoded images to pixels (decode.py), and pixels to the views that are stored (crops.py)."""
