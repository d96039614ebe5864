"""The peers of `make bench`: what a user would pick instead, each in a process and an environment of its own.

install.py makes the environments, measure.py runs the peers' scripts in turns with ours, and turn.py is what a script
uses to take them. The scripts themselves are the other files.
"""
