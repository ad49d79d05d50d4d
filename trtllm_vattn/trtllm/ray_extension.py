"""For ``LLM(orchestrator_type="ray", ray_worker_extension_cls="trtllm_vattn.trtllm.ray_extension.WorkerExtension")``.

Importing this module, which every Ray worker does before it makes its executor, installs the adapter by the settings
in the environment.
"""

from __future__ import annotations

from trtllm_vattn.trtllm import elastic
from trtllm_vattn.trtllm.installation import install

install()


class WorkerExtension:
    """Methods that a Ray worker is given, to be called with the LLM's collective RPC."""

    def vattn_set_budget(self, budget: int | str) -> int:
        """As `elastic.set_budget`."""
        return elastic.set_budget(budget)

    def vattn_release(self) -> int:
        """As `elastic.release`."""
        return elastic.release()

    def vattn_resume(self) -> int:
        """As `elastic.resume`."""
        return elastic.resume()
