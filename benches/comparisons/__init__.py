"""The comparisons of `compare.py`, one a file, and what they share."""
