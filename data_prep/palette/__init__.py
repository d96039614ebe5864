"""The palette: codec.py encodes images to tokens and back, fit.py counts the colors that it is fitted to."""
