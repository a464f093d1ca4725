"""Where quantizers go: one per activation tensor, shared by all its readers; one per weight; a readable table.

The rules hold for each layer, not for a network as a whole: a hybrid gets what each of its parts wants.
(arXiv:2004.09602 for symmetric INT8 with per-channel weights.)

1. Every conv and linear is quantised except the output heads, i.e. the last ones before each model output, and
   transposed convolutions, which TensorRT runs in float whatever their Q/DQ say.
2. A sum of two activations is a quantised residual add where a quantised conv or add feeds it (ReLU apart), unless
   a LayerNorm reads its stream: the residual stream of a transformer has outliers that one scale cannot hold.
3. A tensor gets a quantizer if a quantised layer or add reads it, or if it is what a quantised conv or add
   produces (behind its ReLU): x86 kernels fuse an operation only when its result is quantised, too. A result that
   is read only by what was kept in float (sums, LayerNorms, layers by wish or by the probe) stays as it is.
4. Through operations that only move values (concat, max-pool, nearest resize, pixel shuffle, flatten) the tensors
   on both sides share one quantizer, hence one scale. An average pool computes new values: the tensors on its two
   sides have a scale each, and it runs in INT8 where both have one.
5. What the outlier probe holds stays float, see `outliers`.
Everything else (LayerNorm, softmax, attention products, GELU, means) stays float; layers and sums are listed with
their reason. A placement file overrides rules 1, 2 and 5 where that is possible; `keep_float` overrides the file.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from torch import fx

from fmdeploy.errors import ConfigError
from fmdeploy.quantize.flow import Roles, heads, is_sum, kernel, normalised_streams, odd_sums, roles_of, sources
from fmdeploy.quantize.fold import independent
from fmdeploy.quantize.lift import left_over
from fmdeploy.quantize.ops import Role, is_conv, is_transposed, module_of
from fmdeploy.quantize.placement import ADD, TRANSPOSED_WHY, FloatRow, Placement, Request, WeightRow
from fmdeploy.quantize.tensors import activation_rows, quantised_tensors

NOTHING: Mapping[str, str] = {}


def place(gm: fx.GraphModule, request: Request = Request(), held: Mapping[str, str] = NOTHING) -> Placement:  # noqa: B008
    """Decide the placement for a graph from `trace.float_graph`.

    Args:
        gm: its nodes carry shapes.
        request: what the user asks for.
        held: layers and sums that the outlier probe keeps in float: name → why.

    Raises:
        ConfigError: `request` names what the graph does not have, or wants in INT8 what cannot be.
    """
    roles = roles_of(gm)
    names = layer_names(gm, roles)
    where = "" if request.table is None else f"{request.table.where}, "
    wanted = _Wanted(_wishes(request, names, roles), held, where, request.keep_float)
    last = heads(roles)
    floats = _float_layers(gm, names, set() if request.quantise_heads else last, wanted)
    layers = {node for node, its_role in roles.items() if its_role is Role.WEIGHTED and node not in floats}
    adds, other_sums = _sums(gm, roles, layers, names, wanted)
    floats |= other_sums
    kept = {node for node in floats if is_sum(node) or (node not in last and not _impossible(gm, node))}
    tensors = quantised_tensors(gm, roles, layers, layers - last, adds, kept)
    return Placement(
        "fx",
        None,
        tuple(activation_rows(roles, tensors, request.table)),
        tuple(_weight_rows(gm, roles, layers)),
        tuple(node.name for node in roles if node in adds),
        tuple(FloatRow(node.name, floats[node], names[node], _kind(gm, node)) for node in roles if node in floats),
    )


@dataclass(frozen=True)
class _Wanted:
    """What the user and the outlier probe want.

    Attributes:
        wishes: Name → (precision, why), of the user.
        held: Name → why, of the probe.
        where: The placement file, for messages.
        kept: Names of `keep_float`, which goes before the file.
    """

    wishes: Mapping[str, tuple[str, str]]
    held: Mapping[str, str]
    where: str
    kept: tuple[str, ...]

    def refuse(self, name: str, why: str) -> None:
        """Raise where INT8 was asked for although `why` forbids it."""
        if self.wishes.get(name, ("", ""))[0] == "int8":
            raise ConfigError(f"cannot run in INT8: {why}", where=self.where + name, fix="Say \"float\" there")


def layer_names(gm: fx.GraphModule, roles: Roles) -> dict[fx.Node, str]:
    """What a user calls each layer and sum: the module's name, or the node's where there is no module."""
    fixed = independent(gm)
    return {node: str(node.target) if its_role is Role.WEIGHTED else node.name for node, its_role in roles.items()
            if its_role is Role.WEIGHTED or is_sum(node) or left_over(node, fixed)}


def _kind(gm: fx.GraphModule, node: fx.Node) -> str:
    module = module_of(gm, node)
    return ADD if is_sum(node) else "function" if module is None else type(module).__name__


def _wishes(request: Request, names: Mapping[fx.Node, str], roles: Roles) -> dict[str, tuple[str, str]]:
    """Name → (precision, why) of everything that the user decided; `keep_float` goes before the file."""
    known = set(names.values())
    require_known(request.keep_float, known, "conv, linear or sum")
    wishes: dict[str, tuple[str, str]] = {}
    if request.table is not None:
        require_known(request.table.layers, known, "conv, linear or sum", request.table.where)
        require_known(request.table.calibrators, {node.name for node in roles}, "tensor", request.table.where)
        wishes = {name: (wish.precision, wish.why or "float in the placement file")
                  for name, wish in request.table.layers.items()}
    return wishes | dict.fromkeys(request.keep_float, ("float", "kept float on request"))


def require_known(names: Iterable[str], known: Iterable[str], what: str, where: str | None = None) -> None:
    """Refuse a name that the model does not have.

    Raises:
        ConfigError: names the nearest ones.
    """
    all_known = sorted(known)
    for name in names:
        if name not in all_known:
            near = difflib.get_close_matches(name, all_known, n=3, cutoff=0.4) or all_known[:6]
            raise ConfigError(f"no {what} is called {name!r}", where=where, expected=" or ".join(near) or None)


def _float_layers(
    gm: fx.GraphModule, names: Mapping[fx.Node, str], last: set[fx.Node], wanted: _Wanted
) -> dict[fx.Node, str]:
    """Every layer that stays float, and why."""
    floats: dict[fx.Node, str] = {}
    for node, name in names.items():
        wish, reason = wanted.wishes.get(name, ("", ""))
        if is_sum(node):
            continue
        if why := _impossible(gm, node):
            wanted.refuse(name, why)
            floats[node] = why
        elif wish == "float":
            floats[node] = reason
        elif wish != "int8" and (node in last or name in wanted.held):
            floats[node] = "output head" if node in last else wanted.held[name]
    # A module called twice has one weight: all its calls or none.
    shared = {node.target: why for node, why in reversed(floats.items()) if node.op == "call_module"}
    return floats | {node: shared[node.target] for node in names if node.target in shared}


def _impossible(gm: fx.GraphModule, node: fx.Node) -> str | None:
    if node.op != "call_module":
        return "its weight belongs to no nn.Linear or nn.Conv"
    return TRANSPOSED_WHY if is_transposed(gm, node) else None


def _sums(
    gm: fx.GraphModule, roles: Roles, layers: set[fx.Node], names: Mapping[fx.Node, str], wanted: _Wanted
) -> tuple[set[fx.Node], dict[fx.Node, str]]:
    """The sums that are quantised, and every other sum of two tensors with its reason."""
    adds: set[fx.Node] = set()
    floats: dict[fx.Node, str] = {}
    lost = {node for node, name in names.items() if name in wanted.kept}  # and the sums that only these could feed
    odd, normed = odd_sums(gm, roles), normalised_streams(gm, roles)
    for node in roles:  # in topological order, so a sum of a sum sees the first one decided
        if roles[node] is not Role.ADD and node not in odd:
            continue
        feeding = {kernel(roles, source) for source in sources(node)}
        wish, reason = wanted.wishes.get(node.name, ("", ""))
        why = odd.get(node) or (None if feeding & (layers | adds) else "no INT8 layer feeds it")
        if why is not None and (node in odd or not feeding & lost):
            wanted.refuse(node.name, why)
        elif why is not None:
            lost.add(node)
        if wish == "float":
            why = reason
        elif not wish and node in normed and node not in odd:
            why = "a LayerNorm reads this residual stream"
        elif not wish and why is None and not any(n in adds or (n in layers and is_conv(gm, n)) for n in feeding):
            why = "no quantised conv feeds it"
        elif not wish and why is None:
            why = wanted.held.get(node.name)
        if why is None:
            adds.add(node)
        else:
            floats[node] = why
    return adds, floats


def _weight_rows(gm: fx.GraphModule, roles: Roles, layers: set[fx.Node]) -> list[WeightRow]:
    rows: dict[str, WeightRow] = {}
    for node in roles:
        if node in layers:
            module = gm.get_submodule(str(node.target))
            weight = module.get_parameter("weight")
            rows[str(node.target)] = WeightRow(str(node.target), type(module).__name__, int(weight.shape[0]))
    return list(rows.values())
