"""Compose a captured graph into larger ones: the same step several times in a row, or in a loop that the device ends.

The captured step becomes a child-graph node (CUDA driver API, section 6.20), so nothing is captured again. A loop is a
conditional WHILE node; the step itself writes the condition, an int32 on the device.
"""

from __future__ import annotations

import ctypes
from typing import Any

import torch

from trtllm_vattn.errors import ConfigError, DriverError
from trtllm_vattn.vmm.cuda import CudaDriver

_SOURCE = b"""
extern "C" __device__ __cudart_builtin__ void CUDARTAPI
cudaGraphSetConditional(cudaGraphConditionalHandle handle, unsigned int value);

extern "C" __global__ void set_condition(cudaGraphConditionalHandle handle, const int *go)
{
    cudaGraphSetConditional(handle, *go != 0);
}
"""


class ComposedGraph:
    """An executable graph whose child graphs are clones of a captured one, which must outlive it.

    Attributes
    ----------
    graph : CUgraph
        The graph that was instantiated; valid until `close`.
    bodies : dict
        The body graphs of its conditional nodes, by the node's address.
    """

    def __init__(
        self, driver: CudaDriver, graph: Any, keep: object = None, bodies: dict[int, list[Any]] | None = None
    ) -> None:
        self._driver, self.graph, self._keep = driver, graph, keep
        self.bodies = bodies or {}
        try:
            self._executable = driver.call("cuGraphInstantiate", graph, 0)
        except DriverError:
            driver.call("cuGraphDestroy", graph)
            raise

    def launch(self, stream: int) -> None:
        """Launch on a stream (a cudaStream_t)."""
        self._driver.call("cuGraphLaunch", self._executable, stream)

    def close(self) -> None:
        """Destroy the graph and its executable. Idempotent."""
        executable, self._executable = self._executable, None
        if executable is not None:
            self._driver.call("cuGraphExecDestroy", executable)
            self._driver.call("cuGraphDestroy", self.graph)


def repeat(driver: CudaDriver, captured: int, times: int) -> ComposedGraph:
    """A graph that runs a captured graph (a cudaGraph_t) `times` times in a row."""
    child = driver.cuda.CUgraph(captured)
    graph = driver.call("cuGraphCreate", 0)
    before: list[Any] = []
    for _ in range(times):
        before = [driver.call("cuGraphAddChildGraphNode", graph, before or None, len(before), child)]
    return ComposedGraph(driver, graph)


class WhileConditionKernel:
    """The kernel that sets a WHILE node's condition; NVRTC compiles it for the device.

    Raises ConfigError if NVRTC is missing or this CUDA has no conditional nodes.
    """

    def __init__(self, driver: CudaDriver) -> None:
        try:
            from cuda.bindings import nvrtc
        except ImportError as error:
            raise ConfigError("a device-driven loop needs NVRTC: pip install cuda-python nvidia-cuda-nvrtc") from error
        major, minor = torch.cuda.get_device_capability(driver.device)

        def call(name: str, *arguments: Any) -> Any:
            result, *values = getattr(nvrtc, name)(*arguments)
            if result != nvrtc.nvrtcResult.NVRTC_SUCCESS:
                raise ConfigError(f"{name} answered {result.name}: this CUDA has no conditional graph nodes; use steps")
            return values[0] if values else None

        program = call("nvrtcCreateProgram", _SOURCE, b"set_condition.cu", 0, [], [])
        call("nvrtcCompileProgram", program, 1, [f"--gpu-architecture=sm_{major}{minor}".encode()])
        code = b" " * call("nvrtcGetCUBINSize", program)
        call("nvrtcGetCUBIN", program, code)
        call("nvrtcDestroyProgram", program)
        self._module = driver.call("cuModuleLoadData", code)
        self.function = driver.call("cuModuleGetFunction", self._module, b"set_condition")


def loop_while(driver: CudaDriver, captured: int, go: torch.Tensor, condition: WhileConditionKernel) -> ComposedGraph:
    """A graph that runs a captured graph (a cudaGraph_t) until `go`, int32 ``[1]`` on the device, is 0 after a run."""
    cuda, call = driver.cuda, driver.call
    graph = call("cuGraphCreate", 0)
    try:
        context = call("cuCtxGetCurrent")
        assign_default = 1  # CU_GRAPH_COND_ASSIGN_DEFAULT: at a launch the condition is the handle's default, 1
        handle = call("cuGraphConditionalHandleCreate", graph, context, 1, assign_default)
        node = cuda.CUgraphNodeParams()
        node.type = cuda.CUgraphNodeType.CU_GRAPH_NODE_TYPE_CONDITIONAL
        node.conditional.handle = handle
        node.conditional.type = cuda.CUgraphConditionalNodeType.CU_GRAPH_COND_TYPE_WHILE
        node.conditional.size = 1
        node.conditional.ctx = context
        loop = call("cuGraphAddNode", graph, None, None, 0, node)
        body = node.conditional.phGraph_out[0]
        step = call("cuGraphAddChildGraphNode", body, None, 0, cuda.CUgraph(captured))
        launch = cuda.CUDA_KERNEL_NODE_PARAMS()
        launch.func = condition.function
        launch.gridDimX = launch.gridDimY = launch.gridDimZ = 1
        launch.blockDimX = launch.blockDimY = launch.blockDimZ = 1
        launch.kernelParams = ((int(handle), go.data_ptr()), (ctypes.c_ulonglong, ctypes.c_void_p))
        call("cuGraphAddKernelNode", body, [step], 1, launch)
    except BaseException:
        call("cuGraphDestroy", graph)
        raise
    return ComposedGraph(driver, graph, keep=(condition, go), bodies={int(loop): [cuda.CUgraph(int(body))]})
