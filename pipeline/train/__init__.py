"""Trains a run: setup.py checks the configuration, loop.py is the training loop.

Start at loop.py and README.md. checkpointing.py saves and resumes, validation.py computes the validation loss; data/
orders and reads the images, engine/ runs the model on the ranks, health/ monitors the run, monitor/ records it. The
learning rate schedule is in pipeline/schedule.py.
"""
