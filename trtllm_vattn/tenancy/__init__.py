"""Several processes on one device under budgets that are enforced: a broker creates physical memory and lends it.

May import `vmm`, `memory` and `errors`. msgspec, the extra ``tenancy``, is needed by what speaks to a broker.
"""
