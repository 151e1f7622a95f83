"""The head as ONNX graphs, written by hand: no exporter decides how good the peer is."""

from typing import Any

import numpy as np
import onnx  # type: ignore[import-not-found]
import onnxruntime  # type: ignore[import-not-found]
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper
from tests.benchmarks.rig.heads import Split, Unfolded

from driftline.platform.fused_head import FusedHead, Projected
from driftline.serving.folded_catalogue import FoldedCatalogue

Array = NDArray[Any]
Input = tuple[str, int, list[Any]]
"""Name, type and shape."""


class Graph:
    """Nodes and constants of one model."""

    def __init__(self) -> None:
        self.nodes: list[Any] = []
        self.constants: list[Any] = []

    def constant(self, name: str, value: Array) -> str:
        self.constants.append(numpy_helper.from_array(np.ascontiguousarray(value), name))
        return name

    def node(self, kind: str, inputs: list[str], output: str, **attributes: Any) -> str:
        self.nodes.append(helper.make_node(kind, inputs, [output], **attributes))
        return output

    def layers(self, states: str, weights: list[tuple[Array, Array]]) -> str:
        """Rectifier and linear layer, one after the other; ``[W, X]`` and ``[X]`` each."""
        for number, (weight_WX, bias_X) in enumerate(weights):
            active = self.node("Relu", [states], f"active{number}")
            weight = self.constant(f"weight{number}", weight_WX)
            bias = self.constant(f"bias{number}", bias_X)
            states = self.node("Gemm", [active, weight, bias], f"states{number}")
        return states

    def session(self, further: list[Input], *, output: str) -> Any:
        """A session on one thread, all optimisations on.

        Args:
            further: Inputs beside the rows of page and ads.
            output: Name of the logits.
        """
        rows: list[Input] = [("page", TensorProto.INT64, ["P"]), ("ad", TensorProto.INT64, ["B"])]
        inputs = [helper.make_tensor_value_info(*wanted) for wanted in (*rows, *further)]
        outputs = [helper.make_tensor_value_info(output, TensorProto.FLOAT, ["B", 2])]
        graph = helper.make_graph(self.nodes, "head", inputs, outputs, self.constants)
        opset = [helper.make_opsetid("", 17)]
        model = helper.make_model(graph, opset_imports=opset, ir_version=9)
        onnx.checker.check_model(model)
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = options.inter_op_num_threads = 1
        options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_ALL
        return onnxruntime.InferenceSession(
            model.SerializeToString(), options, providers=["CPUExecutionProvider"]
        )


def sides(widths: dict[str, tuple[int, int]]) -> list[Input]:
    """Inputs for places of categories and numbers, whose widths are given by prefix."""
    found: list[Input] = []
    for prefix, (places, numbers) in widths.items():
        found.append((f"{prefix}places", TensorProto.INT64, [f"{prefix}B", places]))
        found.append((f"{prefix}numbers", TensorProto.FLOAT, [f"{prefix}B", numbers]))
    return found


def gathered_session(fused: FusedHead, products: FoldedCatalogue) -> Any:
    """The same arithmetic as our server's, from the same tables."""
    graph = Graph()
    page = graph.node("Gather", [graph.constant("P", products.page), "page"], "page_1V")
    ad = graph.node("Gather", [graph.constant("A", products.ad), "ad"], "ad_BV")
    shared = graph.node("Add", [page, "impression"], "shared_1V")
    parts = [ad, shared]
    width = len(fused.bias)
    inputs: list[Input] = [("impression", TensorProto.FLOAT, [width])]
    if products.pair is not None:
        parts.append(graph.node("Gather", [graph.constant("Q", products.pair), "pair"], "pair_BV"))
        inputs.append(("pair", TensorProto.INT64, ["B"]))
    output = graph.layers(graph.node("Sum", parts, "states"), list(fused.further))
    return graph.session(inputs, output=output)


def folded_session(fused: FusedHead, mapped: Projected) -> Any:
    """The same arithmetic as our folded head."""
    graph = Graph()
    page = graph.node("Gather", [graph.constant("P", mapped.page), "page"], "page_1V")
    ad = graph.node("Gather", [graph.constant("A", mapped.ad), "ad"], "ad_BV")
    linear = [graph.constant("W", fused.numbers), graph.constant("bias", fused.bias)]
    numbers = graph.node("Gemm", ["numbers", *linear], "numbers_BV")
    table = graph.constant("K", fused.categories)
    gathered = graph.node("Gather", [table, "places"], "categories_BCV")
    axis = graph.constant("axis", np.array([1]))
    categories = graph.node("ReduceSum", [gathered, axis], "categories_BV", keepdims=0)
    states = graph.node("Sum", [ad, page, numbers, categories], "states")
    output = graph.layers(states, list(fused.further))
    widths = {"": (len(fused.first_rows), len(fused.numbers))}
    return graph.session(sides(widths), output=output)


def apart_session(fused: FusedHead, mapped: Projected, split: Split) -> Any:
    """The same arithmetic as our server: what all ads share is computed once."""
    graph = Graph()
    page = graph.node("Gather", [graph.constant("P", mapped.page), "page"], "page_1V")
    ad = graph.node("Gather", [graph.constant("A", mapped.ad), "ad"], "ad_BV")
    table = graph.constant("K", fused.categories)
    axis = graph.constant("axis", np.array([1]))
    sums = {}
    for prefix, columns in (("page_", split.page_numbers), ("ad_", split.ad_numbers)):
        weight = graph.constant(f"{prefix}W", fused.numbers[columns])
        numbers = graph.node("MatMul", [f"{prefix}numbers", weight], f"{prefix}numbers_V")
        gathered = graph.node("Gather", [table, f"{prefix}places"], f"{prefix}gathered")
        places = graph.node("ReduceSum", [gathered, axis], f"{prefix}categories_V", keepdims=0)
        sums[prefix] = [numbers, places]
    bias = graph.constant("bias", fused.bias)
    shared = graph.node("Sum", [*sums["page_"], page, bias], "shared_1V")
    states = graph.node("Sum", [*sums["ad_"], ad, shared], "states")
    output = graph.layers(states, list(fused.further))
    widths = {
        "page_": (len(split.page_categories), len(split.page_numbers)),
        "ad_": (len(split.ad_categories), len(split.ad_numbers)),
    }
    return graph.session(sides(widths), output=output)


def trained_session(parts: Unfolded) -> Any:
    """The graph that an exporter makes of the head: look up, put side by side, multiply."""
    import torch

    spec = parts.head.head.spec
    linears = [one for one in parts.head.head.layers if isinstance(one, torch.nn.Linear)]
    weights = [(one.weight.detach().numpy().T, one.bias.detach().numpy()) for one in linears]
    graph = Graph()
    page = graph.node("Gather", [graph.constant("P", parts.pages), "page"], "page_BH")
    ad = graph.node("Gather", [graph.constant("A", parts.ads), "ad"], "ad_BH")
    table = graph.constant("K", parts.embeddings)
    gathered = graph.node("Gather", [table, "places"], "embedded_BCD")
    flat = graph.node("Flatten", [gathered], "embedded_BE", axis=1)
    fused = graph.node("Concat", [page, ad, flat, "numbers"], "fused", axis=1)
    first = [graph.constant("W", weights[0][0]), graph.constant("bias", weights[0][1])]
    states = graph.node("Gemm", [fused, *first], "states")
    output = graph.layers(states, weights[1:])
    widths = {"": (len(spec.cardinalities), spec.num_numbers)}
    return graph.session(sides(widths), output=output)
