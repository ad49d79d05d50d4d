"""What is changed in a layer's traced graph before it is compiled: fewer kernels for the same numbers.

A model's code says what is computed, one operation at a time; a serving engine computes the same with fewer, larger
kernels. Each rewrite looks for one form that transformers' models have and leaves a graph that has another form alone.
"""

from __future__ import annotations

import operator
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.fx import Graph, Node


def share_products(graph: Graph) -> int:
    """Leave one of equal matrix products; returns how many went."""
    seen: dict[tuple[Any, ...], Node] = {}
    gone = 0
    for node in list(graph.nodes):
        if _is_call(node, nn.functional.linear) and not node.kwargs:
            first = seen.setdefault(node.args, node)
            if first is not node:
                node.replace_all_uses_with(first)
                graph.erase_node(node)
                gone += 1
    return gone


class Rotation(NamedTuple):
    """``x * cos + cat(-x2, x1) * sin``, x1 and x2 the halves of x, `half` wide: a rotary position embedding."""

    x: Node
    cos: Node
    sin: Node
    half: int


def keep_rows(graph: Graph) -> int:
    """In a model's last layer compute what follows attention for the rows that are looked at alone; returns how often.

    Nothing after attention mixes rows: where every operation behind the first sum of attention's output and what the
    layer was given is known to be one by row, those rows are taken out of that sum and put back at the end. Of a pass
    over a prompt of 2,048 tokens one row goes on; the layer's feed-forward part is some 80 % of it.
    """
    done = 0
    for node in list(graph.nodes):
        if node.target is not torch.ops.trtllm_vattn.attend_keeping:
            continue
        *arguments, kept = node.args
        with graph.inserting_before(node):
            attended = graph.call_function(torch.ops.trtllm_vattn.attend, tuple(arguments))
        _replace(node, attended)
        graph.erase_node(node)
        done += _keep_behind(graph, attended, kept)
    return done


def _keep_behind(graph: Graph, attended: Node, kept: Node) -> bool:
    behind = _behind(attended)
    total = next((node for node in graph.nodes if node in behind and _is_call(node, operator.add)), None)
    (output,) = graph.find_nodes(op="output")
    if total is None or _dims(total) != 3 or all(each in behind for each in total.all_input_nodes):
        return False
    after = _behind(total)
    results = output.args[0]
    if not isinstance(results, tuple | list) or len(results) != 1 or results[0] not in after or _dims(results[0]) != 3:
        return False
    before = behind - after - {total, output}
    if any(user not in before and user is not total for node in before | {attended} for user in node.users):
        return False
    if not all(node is output or _is_by_row(node, after | {total}) for node in after):
        return False
    with graph.inserting_after(total):
        rows = graph.call_function(torch.index_select, (total, 1, kept))
    rows.meta.update(total.meta)
    total.replace_all_uses_with(rows, delete_user_cb=lambda user: user is not rows)
    with graph.inserting_before(output):
        whole = graph.call_function(torch.index_copy, (total, 1, kept, results[0]))
    whole.meta.update(total.meta)
    output.args = ((whole,),)
    return True


def add_onto_products(graph: Graph) -> int:
    """Have matrix products add to the residual themselves; returns how often.

    ``residual + linear(x, weight)`` is a sum in the product's own kernel, where the residual is looked at by nobody
    behind it: a sum that this graph made, or what the layer was given, which is the result of the layer before it. Else
    there is a kernel more, which reads and writes all rows.
    """
    done = 0
    for total in list(graph.nodes):
        if not _is_call(total, operator.add):
            continue
        for residual, product in (total.args, total.args[::-1]):
            if _is_plain_product(product) and _may_be_written_over(residual, product, total):
                with graph.inserting_before(total):
                    graph.call_function(torch.ops.trtllm_vattn.linear_onto.default, (residual, *product.args[:2]))
                total.replace_all_uses_with(residual)
                graph.erase_node(total)
                graph.erase_node(product)
                done += 1
                break
    return done


def _is_plain_product(node: Any) -> bool:
    """Whether this is ``linear(x, weight)`` for one user."""
    plain = _is_call(node, nn.functional.linear) and not node.kwargs and node.args[2:] in ((), (None,))
    return plain and len(node.users) == 1


def _may_be_written_over(residual: Any, product: Node, total: Node) -> bool:
    """Whether a sum of both may take the residual's place, and the product the sum's."""
    if not isinstance(residual, Node) or not (residual.op == "placeholder" or _is_call(residual, operator.add)):
        return False
    if _dims(residual) != 3 or not _alike(residual, product):
        return False
    places = {node: place for place, node in enumerate(total.graph.nodes)}
    if max(places[user] for user in _users_of_memory(residual)) != places[total]:
        return False
    # What is multiplied must be the same at the sum as where the product was, and no part of what is written.
    written = [node for node in places if places[product] < places[node] < places[total] and _is_in_place(node)]
    if any(node.target is not torch.ops.trtllm_vattn.linear_onto.default for node in written):
        return False
    return all(product.args[0] not in _views(each) for each in (residual, *(node.args[0] for node in written)))


def _users_of_memory(node: Node) -> set[Node]:
    """What reads a node's result, by itself or by what may be a view of it."""
    return {user for view in _views(node) for user in view.users}


def _views(node: Any) -> set[Node]:
    """A node, and what may be a view of its result."""
    found: set[Node] = {node}
    ahead: list[Node] = [node]
    while ahead:
        new = [user for user in ahead.pop().users if user not in found and not _is_fresh(user)]
        found.update(new)
        ahead += new
    return found


def _is_fresh(node: Node) -> bool:
    """Whether a node's result is memory of its own for certain."""
    return node.op == "call_function" and node.target in BY_ROW and not _is_in_place(node)


def _is_in_place(node: Node) -> bool:
    """Whether a node writes to what it is given, so that it does something even where nobody looks at its result."""
    if node.op == "call_method":
        return str(node.target).endswith("_") and not str(node.target).endswith("__")
    if node.op != "call_function":
        return False
    # Activations have `inplace` by name or as their last argument.
    inplace = node.kwargs.get("inplace", node.target in BY_ROW and len(node.args) > 1 and node.args[-1])
    return node.is_impure() or inplace is True or node.target in IN_PLACE


def _alike(residual: Node, product: Node) -> bool:
    """Whether both are rows of one shape and type, so that one may be written over by their sum."""
    mine, other = (node.meta.get("example_value") for node in (residual, product))
    return mine is not None and other is not None and mine.dtype == other.dtype and mine.shape == other.shape


def _behind(node: Node) -> set[Node]:
    """All that depends on a node."""
    found: set[Node] = set()
    ahead = [node]
    while ahead:
        new = [user for user in ahead.pop().users if user not in found]
        found.update(new)
        ahead += new
    return found


BY_ROW = {
    *(operator.add, operator.mul, operator.sub, operator.truediv, operator.neg),
    *(nn.functional.linear, nn.functional.silu, nn.functional.gelu, nn.functional.relu),
    *(torch.rsqrt, torch.pow, torch.tanh, torch.sigmoid),
}
"""Functions that compute each row of ``[1, rows, ...]`` from that row alone, and from what has no rows."""
IN_PLACE = {
    *(operator.iadd, operator.isub, operator.imul, operator.itruediv, operator.ifloordiv, operator.imod, operator.ipow),
    *(operator.iand, operator.ior, operator.ixor, operator.ilshift, operator.irshift, operator.setitem),
}
METHODS_BY_ROW = {"to", "float", "type_as", "pow", "rsqrt"}


def _is_by_row(node: Node, behind: set[Node]) -> bool:
    """Whether a node, which depends on some of `behind`, computes each row from that row alone; whatever else it is
    given has no rows."""
    if any(each not in behind and _dims(each) not in (None, 0, 1, 2) for each in node.all_input_nodes):
        return False
    if any(_dims(each) != 3 for each in node.all_input_nodes if each in behind) or _dims(node) != 3:
        return False
    if node.op == "call_function":
        if node.target is operator.getitem:
            return _is_part(node, node.args[0])
        if node.target is nn.functional.linear:
            return node.args[0] in behind and not any(each in behind for each in node.args[1:])
        return node.target in BY_ROW
    if _is_method(node, "mean"):
        return node.args[1:] in ((-1,), ((-1,),), ([-1],)) and node.kwargs == {"keepdim": True}
    return node.op == "call_method" and node.target in METHODS_BY_ROW


def _dims(node: Any) -> int | None:
    value = node.meta.get("example_value") if isinstance(node, Node) else None
    return value.dim() if isinstance(value, torch.Tensor) else None


def rotate_with_attention(graph: Graph) -> int:
    """Have attention turn its own queries and keys where a layer turns them right before; returns how often.

    One kernel turns queries and keys and stores keys and values; else there are three. Where queries, keys and values
    are parts of one product, attention is given that as it is.
    """
    ops = torch.ops.trtllm_vattn
    done = 0
    for node in list(graph.nodes):
        if node.target is not ops.attend:
            continue
        q, k, v, layer, *sinks = node.args
        if any(each is not None for each in sinks):
            continue
        turned_q, turned_k = _rotation(_heads_of(q)), _rotation(_heads_of(k))
        if turned_q is None or turned_k is None or turned_q[1:] != turned_k[1:] or 2 * turned_q.half != q.args[3]:
            continue
        angles = turned_q.cos, turned_q.sin
        product = _product_of(turned_q.x, turned_k.x, _heads_of(v))
        with graph.inserting_before(node):
            if product is not None:
                heads = (q.args[2], k.args[2])
                both = graph.call_function(ops.rotate_and_attend_product, (product, *angles, layer, *heads))
            else:
                rows = [_as_rows(graph, like, turned.x) for like, turned in ((q, turned_q), (k, turned_k))]
                both = graph.call_function(ops.rotate_and_attend, (*rows, v, *angles, layer))
        _replace(node, both)
        done += 1
    # torch takes methods that write in place for ones that only give a result.
    graph.eliminate_dead_code(lambda node: node.is_impure() or _is_in_place(node))
    return done


def _heads_of(node: Any) -> Any:
    """What is given to attention as ``heads.transpose(1, 2).reshape(...)``."""
    if _is_method(node, "reshape") and _is_method(node.args[0], "transpose"):
        heads, *dims = node.args[0].args
        return heads if dims == [1, 2] else None
    return None


def _as_rows(graph: Graph, like: Node, x: Node) -> Node:
    """x, reshaped as `like` is."""
    turned = graph.call_method("transpose", (x, 1, 2))
    turned.meta["example_value"] = x.meta["example_value"].transpose(1, 2)
    return graph.call_method("reshape", (turned, *like.args[1:]))


def _replace(node: Node, new: Node) -> None:
    """Use another in a node's place. What Dynamo knows of it goes along: torch looks a graph up among those compiled
    before only if it knows of each method that its object is a tensor."""
    new.meta.update(node.meta)
    node.replace_all_uses_with(new)


def _product_of(*heads: Any) -> Node | None:
    """The product whose parts, all of it and in this order, are viewed as heads."""
    product, end = None, 0
    for each in heads:
        if not _is_method(each, "transpose") or not _is_method(each.args[0], "view"):
            return None
        part = each.args[0].args[0]
        product = product or (part.args[0] if _is_call(part, operator.getitem) else None)
        if product is None or not _is_part(part, product) or part.args[1][1].start != end:
            return None
        end = part.args[1][1].stop
    whole = product.args[1].meta.get("example_value") if product is not None else None
    return product if whole is not None and whole.shape[0] == end else None


def _rotation(node: Any) -> Rotation | None:
    if not _is_call(node, operator.add):
        return None
    straight, crossed = node.args
    if not _is_call(straight, operator.mul) or not _is_call(crossed, operator.mul):
        return None
    (x, cos), (turned, sin) = straight.args, crossed.args
    if not _is_method(cos, "unsqueeze") or not _is_method(sin, "unsqueeze") or not cos.args[1:] == sin.args[1:] == (1,):
        return None
    if not _is_call(turned, torch.cat) or turned.kwargs.get("dim", *turned.args[1:]) != -1:
        return None
    minus, first = turned.args[0]
    if not _is_call(minus, operator.neg) or not _is_part(minus.args[0], x) or not _is_part(first, x):
        return None
    (_, upper), (_, lower) = minus.args[0].args[1], first.args[1]
    if (lower.start, upper.stop) != (None, None) or lower.stop != upper.start:
        return None
    return Rotation(x, cos.args[0], sin.args[0], lower.stop)


def _is_part(node: Any, x: Any) -> bool:
    """Whether this is ``x[..., a:b]``, a part of the last dimension."""
    if not _is_call(node, operator.getitem) or node.args[0] is not x:
        return False
    where = node.args[1]
    return isinstance(where, tuple) and len(where) == 2 and where[0] is Ellipsis and isinstance(where[1], slice)


def _is_call(node: Any, target: object) -> bool:
    return isinstance(node, Node) and node.op == "call_function" and node.target is target


def _is_method(node: Any, name: str) -> bool:
    return isinstance(node, Node) and node.op == "call_method" and node.target == name


def split_even_products(graph: Graph) -> int:
    """Compute equal parts of one matrix product by themselves; returns how many products were split.

    For one token a product is a sum over weights, and what follows on both parts of it is computed in the same kernel.
    """
    done = 0
    for node in list(graph.nodes):
        if not _is_call(node, nn.functional.linear) or node.kwargs or node.args[2:] not in ((), (None,)):
            continue
        parts = list(node.users)
        if len(parts) < 2 or not all(_is_part(part, node) for part in parts):
            continue
        wheres = [part.args[1][1] for part in parts]
        if len({where.stop - where.start for where in wheres}) > 1:
            continue
        x, weight = node.args[:2]
        for part, where in zip(parts, wheres, strict=True):
            with graph.inserting_before(part):
                rows = graph.call_function(operator.getitem, (weight, slice(where.start, where.stop)))
                alone = graph.call_function(nn.functional.linear, (x, rows))
            _replace(part, alone)
            graph.erase_node(part)
        graph.erase_node(node)
        done += 1
    return done
