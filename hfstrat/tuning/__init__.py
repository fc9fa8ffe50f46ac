"""The best model by a deadline: strategies and their settings searched by successive halving. No torch, except in `job.py`."""
