"""How far apart may two largest logits be, and rounding alone still choose between them?

Run as ``python rounding_probe.py``, on any machine with 20 GiB of memory; minutes. Llama-3-8B's shape with random bf16
weights, one prompt, once with each of two attentions of PyTorch, no cache and none of our code but the weights. Prints
by how much logits differ, and of the positions whose likeliest token differs how far apart the two largest logits are.
"""

from __future__ import annotations

import platform

import torch
import transformers

from trtllm_vattn.runtime.models import load_model

TOKENS = 1024
TOLERANCES = (0.0625, 0.125, 0.25, 0.5)


@torch.inference_mode()
def main() -> None:
    model = load_model("llama-3-8b", "cpu", torch.bfloat16, seed=0).eval()
    prompt = torch.randint(0, model.config.vocab_size, (1, TOKENS), generator=torch.Generator().manual_seed(0))
    logits = []
    for attention in ("eager", "sdpa"):
        model.set_attn_implementation(attention)
        logits.append(model(prompt, use_cache=False).logits[0].float())
    first, second = logits
    largest = first.topk(2)
    margins = (largest.values[:, 0] - largest.values[:, 1])[largest.indices[:, 0] != second.argmax(-1)]
    print(f"torch {torch.__version__}, transformers {transformers.__version__}, {platform.machine()}")
    print(f"logits: standard deviation {first.std():.3f}, of their difference {(first - second).std():.3f}")
    print(f"the likeliest token differs at {len(margins)} of {TOKENS} positions")
    for tolerance in TOLERANCES:
        wide = int((margins >= tolerance).sum())
        print(f"of those where the two largest logits are {tolerance} or more apart: {wide}")
    print(f"farthest apart: {margins.max():.4f}")


if __name__ == "__main__":
    main()
