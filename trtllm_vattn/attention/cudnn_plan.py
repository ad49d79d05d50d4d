"""A cuDNN attention graph of fixed shape, built once and executed on raw addresses.

It is built with `pygraph.sdpa` of nvidia-cudnn-frontend, whose documentation of scaled dot product attention explains
the arguments.
"""

from __future__ import annotations

import enum
from dataclasses import dataclass
from typing import Any

import torch

from trtllm_vattn.errors import CaptureError, ConfigError


class Operand(enum.IntEnum):
    """Ids of the graph's tensors; `Plan.execute` takes an address for each tensor that the graph has."""

    Q = 1
    K = 2
    V = 3
    OUT = 4
    QUERY_LENGTHS = 5
    LENGTHS = 6
    TABLE = 7
    QUERY_OFFSETS = 8
    KEY_OFFSETS = 9
    VALUE_OFFSETS = 10
    OUT_OFFSETS = 11


@dataclass(frozen=True)
class PlanShape:
    """The sizes and options that a plan is built for.

    q and the output are ``[lanes, rows, num_heads, head_dim]``, contiguous. K and V have `kv_shape`
    ``[lanes or blocks, num_kv_heads, tokens, head_dim]`` with `kv_strides`. With `blocks_per_lane` they are blocks
    behind an int32 table ``[lanes, blocks_per_lane]``. `causal` masks keys after a query; the last query row is at the
    last key. With `packed`, lane i's queries and keys begin at the element that int32 offsets ``[lanes + 1]`` give, and
    `rows` and the tokens of `kv_shape` are upper bounds.
    """

    lanes: int
    rows: int
    num_heads: int
    kv_shape: tuple[int, int, int, int]
    kv_strides: tuple[int, int, int, int]
    causal: bool
    blocks_per_lane: int = 0
    packed: bool = False


def prefer_cudnn(graph: Any) -> None:
    """Select an engine of cuDNN itself if the frontend selected one of its own.

    The frontend has engines of its own if nvidia-cutlass-dsl is installed. Tests on a GPU show what cuDNN's engines
    load past a length; for the frontend's this is unknown. Raises ConfigError if cuDNN has no engine for the graph.
    """
    chosen = getattr(graph, "selected_engine", None)
    if chosen is None:
        return
    for index in range(len(graph.plans)):
        graph.select_plan(index)
        if graph.selected_engine is None:
            return
    raise ConfigError(
        f"nvidia-cudnn-frontend has only its engine {chosen.name!r} for this, and what that loads past a sequence's "
        "end is not known; uninstall nvidia-cutlass-dsl, or use the torch backend"
    )


class Plan:
    """A built graph and its workspace, whose address captured CUDA graphs may contain.

    Raises CaptureError during a capture, and ConfigError if cuDNN has no attention for the shape.
    """

    def __init__(self, cudnn: Any, handle: Any, shape: PlanShape, dtype: torch.dtype, scale: float) -> None:
        if torch.cuda.is_current_stream_capturing():
            raise CaptureError(
                f"attention for {shape.lanes} lanes of {shape.rows} rows was not planned before the capture; run the "
                "step once before capturing it"
            )
        self._handle = handle
        self._graph = self._describe(cudnn, handle, shape, dtype, scale)
        try:
            self._graph.validate()
            self._graph.build_operation_graph()
            self._graph.create_execution_plans([cudnn.heur_mode.A, cudnn.heur_mode.FALLBACK])
            if not shape.causal:
                prefer_cudnn(self._graph)
            self._graph.check_support()
            self._graph.build_plans()
        except (RuntimeError, ValueError, cudnn.cudnnGraphNotSupportedError) as error:
            raise ConfigError(f"cuDNN {cudnn.backend_version()} has no attention for {shape}: {error}") from error
        self.workspace = torch.empty(self._graph.get_workspace_size(), dtype=torch.uint8, device="cuda")

    @staticmethod
    def _describe(cudnn: Any, handle: Any, shape: PlanShape, dtype: torch.dtype, scale: float) -> Any:
        kinds = {torch.bfloat16: cudnn.data_type.BFLOAT16, torch.float16: cudnn.data_type.HALF}
        graph = cudnn.pygraph(
            io_data_type=kinds[dtype],
            intermediate_data_type=cudnn.data_type.FLOAT,
            compute_data_type=cudnn.data_type.FLOAT,
            handle=handle,
        )
        _, _, _, dim = shape.kv_shape
        row = shape.num_heads * dim
        queries = (shape.lanes, shape.num_heads, shape.rows, dim)
        query_strides = (shape.rows * row, dim, row, 1)

        def integers(operand: Operand, kind: Any, size: tuple[int, int, int, int], name: str) -> Any:
            strides = (size[1] * size[2] * size[3], size[2] * size[3], size[3], 1)
            return graph.tensor(name=name, dim=size, stride=strides, data_type=kind, uid=int(operand))

        per_lane = (shape.lanes, 1, 1, 1)
        q = graph.tensor(name="q", dim=queries, stride=query_strides, data_type=kinds[dtype], uid=int(Operand.Q))
        k, v = (
            graph.tensor(
                name=name,
                dim=shape.kv_shape,
                stride=shape.kv_strides,
                data_type=kinds[dtype],
                uid=int(operand),
            )
            for name, operand in (("k", Operand.K), ("v", Operand.V))
        )
        options: dict[str, Any] = {}
        if shape.blocks_per_lane:
            size = (shape.lanes, 1, shape.blocks_per_lane, 1)
            table = integers(Operand.TABLE, cudnn.data_type.INT32, size, "table")
            options["paged_attention_k_table"] = options["paged_attention_v_table"] = table
            options["paged_attention_max_seq_len_kv"] = shape.blocks_per_lane * shape.kv_shape[2]
        if shape.causal:
            options["diagonal_alignment"] = cudnn.diagonal_alignment.BOTTOM_RIGHT
            options["diagonal_band_right_bound"] = 0
        if shape.packed:
            size = (shape.lanes + 1, 1, 1, 1)
            for tensor, operand in ((q, Operand.QUERY_OFFSETS), (k, Operand.KEY_OFFSETS), (v, Operand.VALUE_OFFSETS)):
                tensor.set_ragged_offset(integers(operand, cudnn.data_type.INT32, size, operand.name.lower()))
        out, _ = graph.sdpa(
            name="attention",
            q=q,
            k=k,
            v=v,
            generate_stats=False,
            attn_scale=scale,
            use_padding_mask=True,
            seq_len_q=integers(Operand.QUERY_LENGTHS, cudnn.data_type.INT32, per_lane, "query_lengths"),
            seq_len_kv=integers(Operand.LENGTHS, cudnn.data_type.INT32, per_lane, "lengths"),
            **options,
        )
        out.set_output(True).set_dim(queries).set_stride(query_strides).set_uid(int(Operand.OUT))
        if shape.packed:
            size = (shape.lanes + 1, 1, 1, 1)
            out.set_ragged_offset(integers(Operand.OUT_OFFSETS, cudnn.data_type.INT32, size, "out_offsets"))
        return graph

    def execute(self, addresses: dict[int, int]) -> None:
        """Launch on the handle's stream; `addresses` are keyed by `Operand`."""
        self._graph.execute(addresses, self.workspace.data_ptr(), handle=self._handle)
