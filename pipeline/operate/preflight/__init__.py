"""`preflight`: checks of the options before a job is submitted, and of a job's nodes before it trains.

Start at command.py. node_checks.py runs on each node; diagnosis.py decides from the nodes' reports which nodes to
exclude. A new check of a node is a function of node_checks.py.
"""
