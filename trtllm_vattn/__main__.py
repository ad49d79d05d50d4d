"""`python -m trtllm_vattn` is `trtllm-vattn`."""

import sys

from trtllm_vattn.cli.main import main

sys.exit(main())
