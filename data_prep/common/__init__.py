"""What both programs share: command lines, exit codes, files, seeds, workers. Imports nothing else of this project."""
