"""The command line: `trtllm-vattn doctor`, `demo`, `run`, `plugin` and `bench`."""
