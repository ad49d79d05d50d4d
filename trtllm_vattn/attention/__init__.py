"""Attention backends over flat KV and over block tables, behind one contract (`base.py`).

May import `cache` and below.
"""
