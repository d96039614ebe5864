"""Completions: ours, and generate() of other libraries."""
