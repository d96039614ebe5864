"""The palette: codec.py turns images into tokens and back, fit.py counts the colors that it is fitted to."""
