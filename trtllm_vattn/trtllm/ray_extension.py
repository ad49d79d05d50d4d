"""For ``LLM(orchestrator_type="ray", ray_worker_extension_cls="trtllm_vattn.trtllm.ray_extension.WorkerExtension")``.

Every Ray worker imports this module before it makes its executor; the import installs the adapter with the settings in
the environment.
"""

from __future__ import annotations

from trtllm_vattn.trtllm import elastic
from trtllm_vattn.trtllm.installation import install

install()


class WorkerExtension:
    """Methods added to each Ray worker, for the LLM's collective RPC to call."""

    def vattn_set_budget(self, budget: int | str) -> int:
        """As `elastic.set_budget`."""
        return elastic.set_budget(budget)

    def vattn_release(self) -> int:
        """As `elastic.release`."""
        return elastic.release()

    def vattn_resume(self) -> int:
        """As `elastic.resume`."""
        return elastic.resume()
