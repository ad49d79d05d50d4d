"""Python runtime API: Engine, sampling, and the binding to Hugging Face models.

May import `graphs`, `attention`, `cache` and below.
"""
