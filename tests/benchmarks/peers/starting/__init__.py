"""Starts of training commands: resumes up to the first step, help, and imports."""
