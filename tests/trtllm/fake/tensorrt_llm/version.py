"""The version that the stand-in plays."""

import os

__version__ = os.environ.get("TRTLLM_FAKE_VERSION", "1.2.1")
MINOR = int(__version__.split(".")[1])
