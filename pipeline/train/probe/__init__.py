"""The probe: how well a linear classifier tells classes apart by the features of each layer, while the model trains.

Start at measure.py.
"""
