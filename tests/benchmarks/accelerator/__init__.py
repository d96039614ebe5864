"""Checks and measures one accelerator: python -m tests.benchmarks.accelerator

Needs torch with CUDA, transformers and the wheels of `make accelerator-wheels`; nothing is fetched. First come the
checks of everything that runs differently on CUDA than on a CPU, then measurements, as far as the seconds reach.

supervisor.py starts one worker process and prints its lines as they come; parts.py lists the parts and their seconds.
The worker (worker.py) imports torch once and runs one part after the other. A part that raises costs its own line. A
part that is stuck, even in a call into the driver that never returns, ends the worker, and a new worker continues with
the next part. The supervisor imports no torch, so nothing can hold it up.
"""
