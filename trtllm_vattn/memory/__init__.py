"""Extents and slots: the pool of physical memory and the arena of addresses that it is mapped into.

May import `vmm` and `errors`; knows nothing of torch but for what `vmm.tensors` gives.
"""
