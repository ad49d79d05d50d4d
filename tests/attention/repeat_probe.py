"""Does decode attention give the same bits again? The same queries over the same memory, called 100 times.

Run as ``python repeat_probe.py``, on a GPU; prints a line for each number of lanes and length: how many calls differ
from the first, in which lanes and by how much, and how far any call is from float32. Once as it comes, once with the
device idle before each call, once with the library's workspace zeroed, too.
"""

from __future__ import annotations

from collections import Counter

import torch
from overread_probe import HEADS, reference

from trtllm_vattn.attention.base import Attention
from trtllm_vattn.attention.select import make_attention
from trtllm_vattn.cache.base import CacheShape, FlatKV
from trtllm_vattn.cache.manager import KVCacheManager
from trtllm_vattn.vmm.open import open_driver

CALLS = 100


def probe(attention: Attention, kv: FlatKV, lanes: int, tokens: int, how: str) -> None:
    q = torch.randn(lanes, HEADS, kv.k.shape[3], device=kv.k.device, dtype=kv.k.dtype)
    lengths = torch.full((lanes,), tokens, dtype=torch.int32, device=q.device)
    want = torch.cat([reference(q[lane, None], kv.k[lane, :tokens], kv.v[lane, :tokens]) for lane in range(lanes)])
    first = attention.decode(1, q, lengths).clone()
    error, most, calls, which = float((first - want).abs().max()), 0.0, 0, Counter[int]()
    for _ in range(CALLS):
        if how != "plain":
            torch.cuda.synchronize()
        if how == "zeroed":
            for storage in attention.storages():
                if storage.dtype == torch.uint8:
                    storage.zero_()
        attention.begin_step()
        again = attention.decode(1, q, lengths).clone()
        differ = (again != first).flatten(1).any(1).nonzero().flatten().tolist()
        which.update(differ)
        calls += bool(differ)
        most = max(most, float((again.float() - first.float()).abs().max()))
        error = max(error, float((again - want).abs().max()))
    print(
        f"{lanes} lanes of {tokens}, {how}: {calls} of {CALLS} differ, in {sorted(which)}, by {most:.6f} or less; from "
        f"float32 by {error:.6f} or less, of values up to {float(want.abs().max()):.3f}"
    )


@torch.inference_mode()
def main() -> None:
    torch.manual_seed(0)
    for lanes in (8, 32, 64, 107, 128):
        shape = CacheShape(2, 8, 128, torch.bfloat16, lanes, 2048)
        with KVCacheManager(shape, open_driver("cuda:0"), 8 << 30) as cache:
            attention = make_attention("auto", cache, HEADS)
            kv = cache.layer(1)
            assert isinstance(kv, FlatKV)
            for tokens in (84, 2000):
                for lane in range(lanes):
                    cache.admit((tokens, lane), tokens)
                    kv.k[lane, :tokens].normal_()
                    kv.v[lane, :tokens].normal_()
                for how in ("plain", "idle", "zeroed"):
                    probe(attention, kv, lanes, tokens, how)
                for lane in range(lanes):
                    cache.release((tokens, lane))


if __name__ == "__main__":
    main()
