"""Which features of an engine are served together, and what is said where two are not.

``python -m trtllm_vattn.runtime.features`` prints the table of trtllm_vattn/README.md. tests/runtime/test_features.py
tries every cell, those of several ranks tests/parallel/test_ranks.py, and the documents' test compares the table.
"""

from __future__ import annotations

FEATURES = {
    "prefix": "prefix cache",
    "drafts": "drafts",
    "fp8": "fp8 keys",
    "windows": "windows",
    "compression": "compression",
    "deterministic": "deterministic",
    "tenancy": "tenancy (broker)",
    "ranks": "several ranks",
    "fork": "fork",
    "sleep": "sleep",
    "grammar": "grammar",
    "logprobs": "logprobs",
}
"""By a word: those of an engine first, then those of a request or a call."""
OF_ENGINE = ("prefix", "drafts", "fp8", "windows", "compression", "deterministic", "tenancy", "ranks")

REFUSED = {
    frozenset({"prefix", "compression"}): "compression is not served with prefix_cache=True",
    frozenset({"prefix", "deterministic"}): "deterministic is True, and prefix_cache is given",
    frozenset({"drafts", "windows"}): "a cache that keeps windows has no tokens that left one",
    frozenset({"drafts", "compression"}): "compression is not served with speculation",
    frozenset({"drafts", "deterministic"}): "deterministic is True, and speculation is given",
    frozenset({"drafts", "grammar"}): "this engine speculates, and drafts are verified by the model's own logits",
    frozenset({"drafts", "logprobs"}): "this engine speculates, and drafts are verified by the model's own logits",
    frozenset({"fp8", "deterministic"}): "deterministic is True, and keys and values are",
    frozenset({"windows", "compression"}): "compression is not served with layers with windows",
    frozenset({"windows", "deterministic"}): "deterministic is True, and decode is by",
    frozenset({"compression", "deterministic"}): "compression is not served with deterministic=True",
    frozenset({"compression", "fork"}): "a request whose tokens are evicted cannot be forked",
    frozenset({"ranks", "prefix"}): "prefix_cache is not served with tensor_parallel",
    frozenset({"ranks", "drafts"}): "speculation is not served with tensor_parallel",
    frozenset({"ranks", "fp8"}): "kv_cache_dtype is 'fp8'; with tensor_parallel",
    frozenset({"ranks", "windows"}): "layers that keep windows, which tensor_parallel does not serve",
    frozenset({"ranks", "compression"}): "compression is served on one rank",
    frozenset({"ranks", "tenancy"}): "a broker lends memory of one device to one process",
    frozenset({"ranks", "sleep"}): "a tensor parallel engine cannot sleep",
    frozenset({"ranks", "grammar"}): "a tensor parallel engine cannot change logits or give log-probabilities",
    frozenset({"ranks", "logprobs"}): "a tensor parallel engine cannot change logits or give log-probabilities",
}
"""What an error says, for each pair that is not served."""

ADAPTER = {
    "prefix": "served",
    "drafts": "a draft model",
    "fp8": "served",
    "windows": "sliding windows",
    "compression": "sparse attention",
    "deterministic": "own",
    "tenancy": "no setting broker",
    "ranks": "own",
    "fork": "beam search",
    "sleep": "host offload",
    "grammar": "own",
    "logprobs": "own",
}
"""TensorRT-LLM's adapter: ``served``, what an error says of what comes nearest, or ``own`` where that is
TensorRT-LLM's, and nothing of the cache's."""


def refusal(one: str, other: str) -> str | None:
    """What an error says of two features, or None where they are served together."""
    return REFUSED.get(frozenset({one, other}))


def feature_table() -> str:
    """The matrix as a Markdown table."""
    names = [*FEATURES]
    rows = [["", *(FEATURES[name] for name in names)]]
    for place, one in enumerate(names):
        cells = ["refused" if refusal(one, other) else "served" for other in names[:place]]
        rows.append([FEATURES[one], *cells, *[""] * (len(names) - place)])
    adapter = [each if each in ("served", "own") else "refused" for each in ADAPTER.values()]
    rows.append(["TensorRT-LLM's adapter", *adapter])
    lines = ["| " + " | ".join(row) + " |" for row in rows]
    return "\n".join([lines[0], "| --- " * (len(names) + 1) + "|", *lines[1:]])


if __name__ == "__main__":
    print(feature_table())
