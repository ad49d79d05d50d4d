"""The command line `trtllm-vattn`: a module for each command; parser.py lists them, main.py runs one."""
