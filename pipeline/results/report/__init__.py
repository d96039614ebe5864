"""report.html and `compare`: start at page.py; html.py fills templates/, sections.py shows a task's JSON."""
