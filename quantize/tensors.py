"""Which activation tensors get a quantizer, and which of them share one."""

from __future__ import annotations

from torch import fx

from fmdeploy.errors import ConfigError
from fmdeploy.quantize.calibrators import Calibrator
from fmdeploy.quantize.flow import Roles, ends, is_norm, readers, result, sources
from fmdeploy.quantize.ops import Role, is_conv
from fmdeploy.quantize.placement import ActivationRow, Table


def quantised_tensors(
    gm: fx.GraphModule, roles: Roles, layers: set[fx.Node], fusable: set[fx.Node], adds: set[fx.Node],
    kept: set[fx.Node],
) -> set[fx.Node]:
    """The nodes whose result is quantised (rules 3 and 4 of `policy`).

    Args:
        gm: a traced float graph.
        roles: of its nodes.
        layers: the conv and linear calls that are quantised.
        fusable: those of them that may write INT8, i.e. no output head.
        adds: the quantised sums.
        kept: layers and sums that stay float by wish or for their values; they read float tensors.
    """
    wanted = {source for node in layers for source in sources(node)} | {s for n in adds for s in add_inputs(n)}
    for node in {node for node in fusable if is_conv(gm, node)} | adds:
        tensor = result(roles, node)
        if not all(end in kept or is_norm(gm, end) for end in ends(roles, tensor)):
            wanted.add(tensor)
    wanted = {node for node in wanted if {roles[user] for user in readers(node)} != {Role.OUTPUT}}
    todo = list(wanted)
    while todo:  # rule 4, backwards: what a moving operation reads is quantised where what it writes is
        node = todo.pop()
        if roles[node] is Role.PASS:
            new = set(sources(node)) - wanted
            wanted |= new
            todo.extend(new)
    return wanted


def add_inputs(node: fx.Node) -> list[fx.Node]:
    """Which inputs of a quantised sum get a quantizer: both, as ONNX Runtime's QLinearAdd needs it."""
    return sources(node)


def activation_rows(roles: Roles, tensors: set[fx.Node], table: Table | None) -> list[ActivationRow]:
    """One row a quantizer: tensors on both sides of an operation that only moves values share one.

    Raises:
        ConfigError: the table gives such tensors different calibrators.
    """
    leader: dict[fx.Node, fx.Node] = {}
    for node in roles:  # union along moving operations; the earliest tensor leads its group
        if node in tensors:
            leader[node] = node
            if roles[node] is Role.PASS:
                members = [leader[source] for source in sources(node)]
                first = next(n for n in roles if n in members)
                leader = {n: first if at in members else at for n, at in leader.items()} | {node: first}
    groups: dict[fx.Node, list[fx.Node]] = {}
    for node in leader:
        groups.setdefault(leader[node], []).append(node)
    return [
        ActivationRow(
            f"act_{index:03d}",
            tuple(node.name for node in members),
            tuple(dict.fromkeys(u.name for node in members for u in readers(node) if roles[u] is not Role.OUTPUT)),
            _calibrator(members, table),
        )
        for index, members in enumerate(groups.values())
    ]


def _calibrator(members: list[fx.Node], table: Table | None) -> Calibrator | None:
    if table is None:
        return None
    chosen = {n.name: table.calibrators[n.name] for n in members if n.name in table.calibrators}
    if len(set(chosen.values())) > 1:
        raise ConfigError("tensors that share one scale have one calibrator", where=table.where,
                          found=", ".join(f"{name} {calibrator}" for name, calibrator in chosen.items()))
    return next(iter(chosen.values()), None)
