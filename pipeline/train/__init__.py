"""Training a run: setup.py checks the configuration, loop.py is the training loop.

Start at loop.py. checkpointing.py saves and resumes, validation.py measures; data/ orders the images, engine/ runs the
model on the ranks, health/ watches the run, monitor/ records it. A new decay is a line in pipeline/schedule.py.
"""
