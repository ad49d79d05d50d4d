"""Attention backends over flat KV and over block tables; `base.py` is their contract.

May import `graphs` and below.
"""
