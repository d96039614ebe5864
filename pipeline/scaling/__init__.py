"""Scaling laws: fits loss against parameters and images over finished runs, and predicts runs that were not trained."""
