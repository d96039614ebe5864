"""Classifiers that tasks train: linear ones on features (logistic.py, sgd.py), and whole models (whole_model.py)."""
