"""Checks of the cache and engine on this machine: differential runs, soaks, negative controls, injected faults.

Below `bench` and `cli`, above everything else: `trtllm-vattn bench soak`, `bench faults` and users' own code run it.
"""
