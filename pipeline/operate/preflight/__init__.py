"""`preflight`: node_checks.py runs on each node, verdict.py judges what the nodes report.

Start at command.py. A new check is a function of node_checks.py.
"""
