"""Shared by both programs: command lines, exit codes, files, seeds, workers. Imports nothing else of this project."""
