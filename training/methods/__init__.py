"""LDLM and the methods that it is compared with, side by side: what only `compare_methods.py` needs."""
