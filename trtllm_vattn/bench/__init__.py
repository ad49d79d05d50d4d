"""Workloads, comparisons, reports and plots.

May import everything but `cli`.
"""
