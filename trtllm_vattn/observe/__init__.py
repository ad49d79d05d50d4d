"""Watching an engine from outside: metrics for Prometheus, a live view, maps of the address space.

It reads what engine and cache give to any thread (`Engine.stats`), and traces (trace.py). It may import everything up
to runtime; nothing below imports it.
"""

SLOTS_PATH = "/metrics/slots"
"""Where a server has its slots, one by one: too many series for a scrape every few seconds."""
