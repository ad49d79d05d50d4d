"""The command line: `trtllm-vattn doctor`, `demo`, `warm-up`, `run`, `plugin` and `bench`."""
