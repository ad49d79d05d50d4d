"""KV of whole sequences from one process's cache to another's: prefill here, decode there."""

from trtllm_vattn.transfer.ipc import IpcLink
from trtllm_vattn.transfer.links import GroupLink, HostLink, Link, NixlLink, open_link
from trtllm_vattn.transfer.registrations import RegisteringDriver
from trtllm_vattn.transfer.sequences import Peer, Received, Sent

__all__ = [
    "GroupLink",
    "HostLink",
    "IpcLink",
    "Link",
    "NixlLink",
    "Peer",
    "Received",
    "RegisteringDriver",
    "Sent",
    "open_link",
]
