"""The command line: `trtllm-vattn doctor`, `trtllm-vattn bench`."""
