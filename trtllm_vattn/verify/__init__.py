"""Does the product do what it says on this machine? Differential runs, soaks, negative controls, injected faults.

Below `bench` and `cli`, above everything else: `trtllm-vattn bench soak`, `bench faults` and users' own code run it.
"""
