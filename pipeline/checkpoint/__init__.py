"""The run folder and its checkpoints: fragments of parameters that any topology can load.

Start at format.py (the files of a checkpoint; how it is written, committed and retained), then fragments.py (the
tensors in it) and run_folder.py (config.yaml, run.json and the lock of a run); run_files.py needs no torch.
"""
