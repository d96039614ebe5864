"""report.html and the command `compare`. Start at page.py; html.py renders templates/, sections.py a task's JSON."""
