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

    vattn_set_budget = staticmethod(elastic.set_budget)
    vattn_release = staticmethod(elastic.release)
    vattn_resume = staticmethod(elastic.resume)
