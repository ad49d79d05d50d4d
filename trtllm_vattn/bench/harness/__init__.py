"""What the cases share: contenders that take turns, timing, traces, flags, results."""
