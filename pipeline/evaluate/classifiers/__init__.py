"""Classifiers that tasks train: linear ones on features (logistic.py, sgd.py), and full models (full_model.py)."""
