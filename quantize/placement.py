"""Where quantizers go: one per activation tensor, shared by all its readers; one per weight; a readable table.

The rules, in order (arXiv 2004.09602 for symmetric INT8 with per-channel weights):

1. Every conv and linear is quantised except the output heads, i.e. the last ones before each model output.
2. A sum of two activations is a quantised residual add where a quantised conv or add feeds it (ReLU apart).
   Sums in transformers (fed by Linear) stay float: their residual stream has outliers that one scale cannot hold.
3. A tensor gets a quantizer if a quantised layer or add reads it, or if it is what a quantised conv or add
   produces (behind its ReLU): x86 kernels fuse an operation only when its result is quantised, too.
4. Through operations that only move values (concat, max-pool, nearest resize, pixel shuffle, flatten) the tensors
   on both sides share one quantizer, hence one scale.
Everything else stays float and is listed with its reason.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict, dataclass
from typing import Any, Literal

from torch import fx

from fmdeploy.errors import ArtifactError, ConfigError
from fmdeploy.quantize.ops import Role, is_conv, is_transposed, role

FORMAT = 1


@dataclass(frozen=True)
class ActivationRow:
    """One activation quantizer: the tensors it stands at, and who reads them."""

    quantizer: str
    tensors: tuple[str, ...]
    readers: tuple[str, ...]


@dataclass(frozen=True)
class WeightRow:
    """One weight quantizer, per output channel."""

    module: str
    kind: str
    channels: int


@dataclass(frozen=True)
class FloatRow:
    """A layer or add that stays float, and why."""

    node: str
    why: str


@dataclass(frozen=True)
class Placement:
    """The whole table. `method` is "graph", or "modules" where torch.fx could not follow `forward`."""

    method: Literal["graph", "modules"]
    reason: str | None
    activations: tuple[ActivationRow, ...]
    weights: tuple[WeightRow, ...]
    adds: tuple[str, ...]
    floats: tuple[FloatRow, ...]

    def to_json(self) -> dict[str, Any]:
        """Return plain JSON values."""
        return {"format": FORMAT, **asdict(self)}

    @classmethod
    def from_json(cls, values: dict[str, Any]) -> Placement:
        """Read back what `to_json` gave.

        Raises:
            ArtifactError: the format is another one, or a field is missing.
        """
        if values.get("format") != FORMAT:
            raise ArtifactError("unknown placement format", expected=FORMAT, found=values.get("format"))
        try:
            return cls(
                values["method"],
                values["reason"],
                tuple(ActivationRow(r["quantizer"], tuple(r["tensors"]), tuple(r["readers"]))
                      for r in values["activations"]),
                tuple(WeightRow(**row) for row in values["weights"]),
                tuple(values["adds"]),
                tuple(FloatRow(**row) for row in values["floats"]),
            )
        except (KeyError, TypeError) as error:
            raise ArtifactError(f"placement.json lacks a field: {error}", fix="Re-run the quantize stage") from error


def place(gm: fx.GraphModule, *, keep_float: Iterable[str] = (), quantise_heads: bool = False) -> Placement:
    """Decide the placement for a graph from `trace.float_graph`.

    Args:
        gm: its nodes carry shapes.
        keep_float: names of modules (such as "stem.0") that stay float.
        quantise_heads: quantise the last layers before the outputs as well (their results stay float).

    Raises:
        ConfigError: `keep_float` names a module that is no conv or linear of this graph.
    """
    roles = {node: role(gm, node) for node in gm.graph.nodes}
    weighted = [node for node in roles if roles[node] is Role.WEIGHTED]
    heads = _heads(roles)
    floats = {} if quantise_heads else dict.fromkeys(heads, "output head")
    floats |= dict.fromkeys((n for n in weighted if is_transposed(gm, n)), "TensorRT runs ConvTranspose in float")
    floats |= dict.fromkeys(_named(weighted, tuple(keep_float)), "kept float on request")
    held = {node.target for node in floats}  # a module called twice has one weight: all its calls or none
    floats |= dict.fromkeys((n for n in weighted if n.target in held and n not in floats), "shares a float weight")
    quantised = {node for node in weighted if node not in floats}
    adds = _residual_adds(gm, roles, quantised)
    floats |= {n: "no quantised conv feeds it" for n, r in roles.items() if r is Role.ADD and n not in adds}
    fusable = {node for node in quantised - heads if is_conv(gm, node)} | adds
    tensors = _quantised_tensors(roles, quantised | adds, fusable)
    return Placement(
        "graph",
        None,
        tuple(_activation_rows(roles, tensors)),
        tuple(_weight_rows(gm, weighted, quantised)),
        tuple(node.name for node in roles if node in adds),
        tuple(FloatRow(node.name, floats[node]) for node in roles if node in floats),
    )


def _heads(roles: dict[fx.Node, Role]) -> set[fx.Node]:
    """The first weighted layers met when walking back from the outputs."""
    heads: set[fx.Node] = set()
    todo = [node for node, its_role in roles.items() if its_role is Role.OUTPUT]
    seen = set(todo)
    while todo:
        for source in todo.pop().all_input_nodes:
            if roles[source] is Role.WEIGHTED:
                heads.add(source)
            elif source not in seen:
                seen.add(source)
                todo.append(source)
    return heads


def _named(weighted: list[fx.Node], names: tuple[str, ...]) -> list[fx.Node]:
    known = {str(node.target) for node in weighted}
    if unknown := [name for name in names if name not in known]:
        raise ConfigError(f"no conv or linear is called {unknown[0]!r}", found=sorted(known)[:6])
    return [node for node in weighted if node.target in names]


def _residual_adds(gm: fx.GraphModule, roles: dict[fx.Node, Role], quantised: set[fx.Node]) -> set[fx.Node]:
    adds: set[fx.Node] = set()
    for node, its_role in roles.items():  # in topological order, so a sum of a sum sees the first one decided
        if its_role is Role.ADD:
            kernels = [_kernel(roles, source) for source in node.all_input_nodes]
            if any((kernel in quantised and is_conv(gm, kernel)) or kernel in adds for kernel in kernels):
                adds.add(node)
    return adds


def _kernel(roles: dict[fx.Node, Role], node: fx.Node) -> fx.Node:
    """The operation whose result `node` is, seen through ReLU and through operations that only move values."""
    while roles[node] in (Role.RELU, Role.PASS) and len(node.all_input_nodes) == 1:
        node = node.all_input_nodes[0]
    return node


def _quantised_tensors(
    roles: dict[fx.Node, Role], quantised: set[fx.Node], fusable: set[fx.Node]
) -> set[fx.Node]:
    wanted = {source for node in quantised for source in node.all_input_nodes}
    wanted |= {_result(roles, node) for node in fusable}
    wanted = {node for node in wanted if {roles[user] for user in node.users} != {Role.OUTPUT}}
    todo = list(wanted)
    while todo:  # rule 4, backwards: what a moving operation reads is quantised where what it writes is
        node = todo.pop()
        if roles[node] is Role.PASS:
            new = set(node.all_input_nodes) - wanted
            wanted |= new
            todo.extend(new)
    return wanted


def _result(roles: dict[fx.Node, Role], node: fx.Node) -> fx.Node:
    """The tensor that one kernel writes for `node`: behind the ReLU, where a ReLU alone reads it."""
    readers = list(node.users)
    return readers[0] if len(readers) == 1 and roles[readers[0]] is Role.RELU else node


def _activation_rows(roles: dict[fx.Node, Role], tensors: set[fx.Node]) -> list[ActivationRow]:
    leader: dict[fx.Node, fx.Node] = {}
    for node in roles:  # union along moving operations; the earliest tensor leads its group
        if node in tensors:
            leader[node] = node
            if roles[node] is Role.PASS:
                members = [leader[source] for source in node.all_input_nodes]
                first = next(n for n in roles if n in members)
                leader = {n: first if at in members else at for n, at in leader.items()} | {node: first}
    groups: dict[fx.Node, list[fx.Node]] = {}
    for node in leader:
        groups.setdefault(leader[node], []).append(node)
    return [
        ActivationRow(
            f"act_{index:03d}",
            tuple(node.name for node in members),
            tuple(dict.fromkeys(u.name for node in members for u in node.users if roles[u] is not Role.OUTPUT)),
        )
        for index, members in enumerate(groups.values())
    ]


def _weight_rows(gm: fx.GraphModule, weighted: list[fx.Node], quantised: set[fx.Node]) -> list[WeightRow]:
    rows: dict[str, WeightRow] = {}
    for node in weighted:
        if node in quantised:
            module = gm.get_submodule(str(node.target))
            weight = module.get_parameter("weight")
            rows[str(node.target)] = WeightRow(str(node.target), type(module).__name__, int(weight.shape[0]))
    return list(rows.values())
