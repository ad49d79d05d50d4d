"""One module a benchmark, with `add_arguments(parser)` and `run(args)`, which returns the exit code."""
