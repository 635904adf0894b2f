"""Find the stages of a model's encoder from the graph of one forward.

1. The operations of one forward form a graph. A map is on the trunk if every path from the images to the encoder's
   deepest map goes through it. The outputs of blocks are on the trunk; maps inside a block and skip connections are
   not.
2. The encoder ends at the coarsest resolution. Maps at this resolution belong to a head if they have fewer channels,
   are logits, or are 1x1 projections for the decoder. Maps after the resolution rises, pooled pyramids and the reduced
   keys of an attention are not on the trunk.
3. The stages are the trunk's last maps of each resolution, or the maps that one module lists in its output.
"""

import difflib
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

from contextrast_kernels.attach.trace import IMAGE, Call, Graph, Layer

MAX_LAYERS = 4
_MIN_STRIDE = 4
_MAX_STEP = 4
_MAX_NAMES = 12
_PLAIN = 0.9
"""If this share of the products with weights is at one resolution, the model has depths and no stages."""
_NARROW = 0.75
"""A coarser map belongs to a head if its channels are below this share of a finer stage's, as in a pooled pyramid."""


_PROBABLY = "These layers are probably the encoder's stages, but "
_EXCHANGE = f"{_PROBABLY}they are parallel branches that exchange their maps, and not one chain of stages."
_BYPASSED = f"{_PROBABLY}another path of the model bypasses {{}}."
_TWO = f"{_PROBABLY}{{}} ends a second encoder of the same depth, which is left out."
_SAME = f"{_PROBABLY}{{}} follows {{}} at the same resolution, and may belong to the head."


class NotFound(Exception):
    """There are no stages. The message says why; ``names`` holds layers that may be named instead."""

    def __init__(self, why: str, names: Sequence[str] = ()):
        super().__init__(why)
        self.names = list(names)


def find_stages(calls: list[Call], graph: Graph | None, reason: str) -> tuple[list[Layer], str]:
    """The encoder's stages, and a sentence about what is not certain, or "".

    Raises:
        ValueError: the stages cannot be told from other maps; the error lists the candidates and the call to make.
    """
    logits: set[int] = set()
    try:
        if graph is None:
            raise NotFound(f"its operations cannot be recorded ({reason})")
        finder = _Finder(calls, graph)
        logits = finder.logits
        return finder.find()
    except NotFound as error:
        maps = [
            layer
            for call in calls
            for layer, node in call.maps
            if call.module and layer.pixels > 1 and node not in logits
        ]
        maps = deep(maps) or maps
        known = [layer.name for layer in sorted(maps, key=lambda layer: layer.name.count("."))]
        names = error.names or _before_the_coarsest(maps)
        remedy = (
            f"Name the layers yourself, as in ck.attach(model, layers={names}). "
            f"Candidates: {_listed(known, len(known))}"
            if known
            else "No module gives a feature map of the image. Attach to a model that does"
        )
        raise ValueError(f'layers: "auto" found no encoder: {error}. {remedy}.') from None


def _before_the_coarsest(maps: list[Layer]) -> list[str]:
    """The last map of each size up to the coarsest one, where an encoder ends, and the first of the coarsest ones or
    that of the outermost module around it."""
    coarsest = min((layer.pixels for layer in maps), default=0)
    last: dict[tuple[int, ...], str] = {}
    for i, layer in enumerate(maps):
        last[layer.size] = layer.name
        if layer.pixels == coarsest:
            around = [m.name for m in maps[i:] if m.pixels == coarsest and _inside(layer.module, m.module)]
            last[layer.size] = [layer.name, *around][-1]
            break
    return list(last.values())[-MAX_LAYERS:]


def look_up(names: Sequence[str], calls: list[Call]) -> list[Layer]:
    """The layers that the user named."""
    known: dict[str, list[Layer]] = {}
    for call in calls:
        if call.maps:
            known.update({layer.name: [layer] for layer in call.layers})
            known.setdefault(call.module, max(_lists(call.layers), key=len, default=[]))
    known = {name: layers for name, layers in known.items() if layers}
    chosen = []
    for name in names:
        if name not in known:
            close = difflib.get_close_matches(name, known, n=_MAX_NAMES, cutoff=0.0)
            raise ValueError(
                f"layers: expected names of modules that gave a feature map in the example's forward, got {name!r}. "
                f"Choose from these, closest first: {_listed(close, len(known))}."
            )
        chosen += known[name]
    return list(dict.fromkeys(chosen))


def _listed(names: Sequence[str], total: int) -> str:
    more = total - len(names[:_MAX_NAMES])
    return ", ".join(map(repr, names[:_MAX_NAMES])) + (f" and {more} more" if more else "")


def deep(layers: list[Layer]) -> list[Layer]:
    """The maps whose size allows them to be stages."""
    return [layer for layer in layers if layer.stride >= _MIN_STRIDE and layer.pixels > 1]


def _lists(layers: list[Layer]) -> list[list[Layer]]:
    """The stages in each list, tuple or mapping of a module's output."""
    lists: dict[tuple, list[Layer]] = {}
    for layer in deep(layers):
        lists.setdefault(layer.path[:-1], []).append(layer)
    return [_of_each_size(found) for found in lists.values() if _may_be_stages(found)]


def _may_be_stages(found: list[Layer]) -> bool:
    """Whether the maps of one list, tuple or mapping may be stages.

    The entries of a mapping may have different meanings, such as masks, queries and a last hidden state. They are
    stages only if every entry is a map with a different stride.
    """
    named = any(layer.path and isinstance(layer.path[-1], str) for layer in found)
    sizes, layouts = {layer.size for layer in found}, {layer.layout for layer in found}
    return not named or len(found) == 1 or (len(found) == len(sizes) > 2 and len(layouts) == 1)


def _of_each_size(layers: list[Layer]) -> list[Layer]:
    """At most four layers. More than four are blocks, of which the last of each size is taken, or the last four if all
    have one size."""
    last = list({layer.size: layer for layer in layers}.values())
    return (last if len(layers) > MAX_LAYERS and len(last) > 1 else layers)[-MAX_LAYERS:]


def _step(coarse: Layer, fine: Layer) -> float:
    """The factor by which one map is coarser than another, along the axis where it is largest."""
    return max(b / a for a, b in zip(coarse.size, fine.size))


def _inside(module: str, parent: str) -> bool:
    return module != parent and (parent == "" or module.startswith(f"{parent}."))


@dataclass(frozen=True)
class _Unit:
    """A map on the trunk, and the operations between the trunk's previous map and this one."""

    layer: Layer
    node: int
    kernels: tuple[int, ...]
    parametric: bool
    bare: bool
    """True for a product with weights that no normalisation and no activation follows."""
    pooled: bool
    certain: bool
    """False if another path bypasses this map."""


def _pattern(unit: _Unit) -> str:
    """The module's name without its numbers."""
    return re.sub(r"\d+", "#", unit.layer.module)


class _Finder:
    def __init__(self, calls: list[Call], graph: Graph):
        self.calls = {call.module: call for call in calls}
        self.graph = graph
        self.rise = self._rises()
        self.turn = self._turns()
        self.dominator, self.depth = self._dominators()
        self.shaped = {s for n, shapes in enumerate(graph.shapes) if shapes for s in graph.sources[n]}
        """The nodes that a normalisation or an activation reads."""
        self.weight = self._weights()
        self.logits = self._logits()
        self.candidates = [
            (call, layer, node)
            for call in calls
            if self._can_be_tapped(call)
            for layer, node in call.maps
            if node and layer.pixels > 1
        ]
        given = {node for _, _, node in self.candidates}
        self.candidates = [c for c in self.candidates if not self._skips(c[0], c[2], given)]

    # ------------------------------------------------------------------------------------------------------- the graph

    def _rises(self) -> list[int]:
        """``Graph.rise`` without the rises inside residual blocks whose branch works at one coarser resolution."""
        rise = list(self.graph.rise)
        for call in self.calls.values():
            inside = range(call.start, call.end)
            if call.module and len({rise[n] for n in inside} - {0}) == 1 and self._adds_its_input(call):
                for n in inside:
                    rise[n] = 0
        return rise

    def _adds_its_input(self, call: Call) -> bool:
        """Whether a module's map is the sum of its input and something computed from it."""
        graph, found, todo = self.graph, set(), [n for _, n in call.maps if n]
        while todo:
            n = todo.pop()
            if n < call.start:
                return True
            if n not in found and not (graph.parameters[n] or graph.shapes[n] or graph.rise[n] or n in graph.joins):
                found.add(n)
                todo += graph.sources[n]
        return False

    def _turns(self) -> list[float]:
        """For each node, the pixels of the coarsest map on its way whose resolution is raised; inf if there is none."""
        turn = [math.inf] * len(self.graph)
        for n in range(1, len(self.graph)):
            turn[n] = min([self.rise[n] or math.inf, *(turn[s] for s in self.graph.sources[n])])
        return turn

    def _weights(self) -> list[int]:
        """For each node, the parameters on the way from the images that has the most."""
        weight = [0] * len(self.graph)
        for n in range(1, len(self.graph)):
            weight[n] = max(weight[s] for s in self.graph.sources[n]) + self.graph.parameters[n]
        return weight

    def _dominators(self) -> tuple[list[int], list[int]]:
        """For each node, its immediate dominator (the last node on every path from the images) and their number."""
        dominator, depth = [IMAGE] * len(self.graph), [0] * len(self.graph)
        for n in range(1, len(self.graph)):
            first, *others = self.graph.sources[n]
            for other in others:
                while first != other:
                    if depth[first] < depth[other]:
                        other = dominator[other]
                    else:
                        first = dominator[first]
            dominator[n], depth[n] = first, depth[first] + 1
        return dominator, depth

    def _logits(self) -> set[int]:
        """The nodes between a product with weights and the model's output, with no parameters in between, if no
        normalisation or activation reads the product."""
        graph, free, todo = self.graph, set(), list(self.graph.outputs)
        while todo:
            n = todo.pop()
            if n not in free and n != IMAGE:
                free.add(n)
                todo += () if graph.parameters[n] else graph.sources[n]
        found: set[int] = set()
        for n in sorted(free):
            bare = graph.kernel[n] > 0 and n not in self.shaped
            follows = not graph.parameters[n] and not graph.shapes[n] and found.issuperset(graph.sources[n])
            if bare or follows:
                found.add(n)
        return found

    def _can_be_tapped(self, call: Call) -> bool:
        """Whether a module gives one map. A shared ReLU, which its parent calls several times, gives many."""
        parent = call.module.rpartition(".")[0]
        while parent not in self.calls:  # a ModuleList is never called itself
            parent = parent.rpartition(".")[0]
        return call.parametric or call.calls == self.calls[parent].calls

    def _skips(self, call: Call, node: int, given: set[int]) -> bool:
        """Whether a module only concatenates its input and the map that it computes from it."""
        sources = self.graph.sources[node]
        join = node in self.graph.joins and len(sources) == 2 and given.issuperset(sources)
        return join and sources[0] < call.start <= sources[1]

    def _is_hidden(self, call: Call, layer: Layer, node: int) -> bool:
        """Whether this map only serves finer maps of a module around it, as the reduced keys of an attention do."""
        parent = call.module.rpartition(".")[0]
        while parent:
            around = self.calls.get(parent)
            if around is not None and around.maps and around.start <= node < around.end:
                finer = layer.pixels < min(other.pixels for other in around.layers)
                if finer and not any(self.rise[around.start : around.end]):
                    ends = [n for _, n in around.maps if n]
                    if node in self.graph.ancestors(ends, stop=range(around.start)):
                        return True
            parent = parent.rpartition(".")[0]
        return False

    # ------------------------------------------------------------------------------------------------------- the trunk

    def find(self) -> tuple[list[Layer], str]:
        trunk, needed = self._trunk()
        stages = self._stages(trunk)
        layers, doubt = self._listed(stages, needed) or self._check(trunk, stages)
        return layers, doubt or (self._second_encoder(trunk[-1]) if trunk else "")

    def _trunk(self) -> tuple[list[_Unit], set[int]]:
        """The units from the image to the encoder's end, and all nodes that the last map of its resolution needs."""
        ends = self._ends()
        for pixels in sorted({layer.pixels for layer, _ in ends}):
            group = [node for layer, node in ends if layer.pixels == pixels]
            most = max(self.weight[node] for node in group)
            # Of equally heavy maps, as of two streams that are added at every stage, the one that depends on the other.
            end = max((n for n in group if self.weight[n] == most), key=lambda n: (len(self.graph.ancestors([n])), n))
            trunk = self._cut(self._units(end), pixels)
            if trunk and trunk[-1].layer.pixels == pixels:
                return trunk, self.graph.ancestors([end])
        return [], set()

    def _ends(self) -> list[tuple[Layer, int]]:
        """The maps where an encoder may end, and their nodes."""
        return [
            (layer, node)
            for call, layer, node in self.candidates
            if node not in self.logits and self.turn[node] > layer.pixels and not self._is_hidden(call, layer, node)
        ]

    def _second_encoder(self, end: _Unit) -> str:
        """A sentence about a map as coarse as the encoder's end, with at least half as many parameters on a path of its
        own, or ""."""
        before, found = self.graph.ancestors([end.node]), []
        for layer, node in self._ends():
            needed = self.graph.ancestors([node])
            if layer.pixels == end.layer.pixels and node not in before and end.node not in needed:
                own = self.weight[node] - max(self.weight[n] for n in needed & before)
                if own >= self.weight[end.node] / 2:
                    found.append(layer.name)
        return _TWO.format(repr(min(found, key=lambda name: name.count(".")))) if found else ""

    def _units(self, end: int) -> list[_Unit]:
        """The trunk's maps up to a node, in order, each of the outermost module that is one step of the trunk."""
        line = [end]
        while line[-1] != IMAGE:
            line.append(self.dominator[line[-1]])
        certain = set(line)
        sure = self._steps(certain)
        # If two branches exchange maps, no map is on every path. The path with the most parameters is then the trunk.
        path, around = set(), self.graph.ancestors([end])
        for (fine, start), (coarse, n) in pairwise(sure):
            if _step(coarse, fine) > 2:
                while n > start:
                    path.add(n)
                    n = max((s for s in self.graph.sources[n] if s >= start), key=lambda s: self.weight[s])
        steps = self._steps(certain | path) if path else sure
        units, last = [], IMAGE
        for layer, node in steps:
            between = [n for n in self.graph.ancestors([node], stop=frozenset([last])) if n > last and n in around]
            kernels = tuple(self.graph.kernel[n] for n in sorted(between) if self.graph.kernel[n])
            units.append(
                _Unit(
                    layer,
                    node,
                    kernels,
                    any(self.graph.parameters[n] for n in between),
                    bool(kernels) and not any(self.graph.shapes[n] for n in between) and node not in self.shaped,
                    any(self.graph.pools[n] for n in between),
                    node in certain,
                )
            )
            last = node
        return units

    def _steps(self, line: set[int]) -> list[tuple[Layer, int]]:
        """The maps of the nodes on a line, in order, without those inside a module that is one step itself."""
        by_node: dict[int, Layer] = {}
        for _, layer, node in self.candidates:
            if node in line:
                by_node.setdefault(node, layer)
        maps = sorted((node, layer) for node, layer in by_node.items())
        steps = [(call, layer, node) for call, layer, node in self.candidates if node in line and call.start <= node]
        holders = {call.module for call, layer, node in steps if self._holds_stages(call, layer, node, maps)}
        steps = [step for step in steps if step[0].module not in holders]
        outer = {call.module for call, _, _ in steps}
        kept: dict[int, Layer] = {}
        for call, layer, node in steps:
            if not any(_inside(call.module, module) for module in outer):
                kept.setdefault(node, layer)
        return sorted(((layer, node) for node, layer in kept.items()), key=lambda step: step[1])

    def _holds_stages(self, call: Call, layer: Layer, node: int, maps: list[tuple[int, Layer]]) -> bool:
        """Whether a module with a map on the trunk contains stages, so that it is not a stage itself."""
        own = {n for _, n in call.maps}
        before = max((m for m in maps if m[0] < call.start), key=lambda m: m[0], default=(IMAGE, None))
        inner = [(n, m) for n, m in maps if call.start <= n < node and n not in own and m.stride >= _MIN_STRIDE]
        coarsest = min(other.pixels for other in call.layers)
        widest = max(other.channels for other in call.layers)
        for n, m in inner:
            if m.pixels <= coarsest:
                continue
            if before[1] is None or m.pixels < before[1].pixels:
                return True
            # The map has the resolution of the module's input. It ends a stage if the module has more than one product.
            # A map with more channels than the module's output is the inside of an inverted residual.
            if m.pixels == before[1].pixels and before[1].channels <= m.channels <= widest:
                between = self.graph.ancestors([n], stop=frozenset([before[0]]))
                after = self.graph.ancestors([node], stop=frozenset([n]))
                kernels = [self.graph.kernel[k] for k in between if self.graph.kernel[k]]
                pools_only = not any(self.graph.parameters[k] for k in after) and max(kernels, default=0) > 1
                if len(kernels) > 1 or pools_only:
                    return True
        return False

    def _cut(self, units: list[_Unit], pixels: int) -> list[_Unit]:
        """The units up to the encoder's end; empty if the last resolution is not one of an encoder."""
        units = [u for u in units if u.node not in self.logits]
        before = [u for u in units if u.layer.pixels != pixels]
        coarsest = [u for u in units if u.layer.pixels == pixels]
        widest = max((u.layer.channels for u in before if u.layer.stride >= _MIN_STRIDE), default=0)
        kept: list[_Unit] = []
        for u in coarsest:
            if not kept and (u.pooled or (before and _step(u.layer, before[-1].layer) > _MAX_STEP + 0.5)):
                return []
            if kept and u.layer.channels < kept[-1].layer.channels:
                break
            if kept and u.kernels == (1,) and (u.bare or u.layer.channels == kept[-1].layer.channels):
                break
            kept.append(u)
        kept = self._alike(before, kept)
        if not any(u.parametric for u in kept) or max(u.layer.channels for u in kept) < _NARROW * widest:
            return []
        return before + kept

    def _alike(self, before: list[_Unit], kept: list[_Unit]) -> list[_Unit]:
        """Remove the units of a head: those after the last unit that is named like the previous stage (with a different
        number), if they are built differently and no earlier stage has one of their name."""
        same = [i for i, u in enumerate(kept) if before and u.kernels and _pattern(u) == _pattern(before[-1])]
        if not same:
            return kept
        end, last, names = same[-1] + 1, kept[same[-1]], {_pattern(u) for u in before if len(u.kernels) > 1}
        while end < len(kept):
            u = kept[end]
            if u.kernels and not self._same_kind(u, last) and _pattern(u) not in names:
                break
            end += 1
        return kept[:end]

    # ------------------------------------------------------------------------------------------------------ the stages

    def _stages(self, trunk: list[_Unit]) -> list[_Unit]:
        """The last unit of each resolution and width. A stage begins with a unit that has parameters."""
        stages: list[_Unit] = []
        for u in trunk:
            if u.layer.stride < _MIN_STRIDE:
                continue
            if stages and (stages[-1].layer.channels, stages[-1].layer.size) == (u.layer.channels, u.layer.size):
                stages[-1] = u
            elif u.parametric:
                stages.append(u)
        # Blocks of different width at one resolution may be several stages, as in a dilated network. Single layers are
        # not stages, and at the finest resolution all but the last belong to the stem.
        last = {u.layer.size: u for u in stages}
        stages = [
            u
            for u in stages
            if u is last[u.layer.size] or (len(u.kernels) > 1 and u.layer.size != stages[0].layer.size)
        ]
        chosen = _of_each_size([u.layer for u in stages])
        return [u for u in stages if u.layer in chosen]

    def _listed(self, stages: list[_Unit], needed: set[int]) -> tuple[list[Layer], str] | None:
        """The stages as one module lists them in its output, if one does."""
        found = []
        for call in self.calls.values():
            nodes = {layer.name: node for layer, node in call.maps if node}
            for layers in _lists(call.layers):
                sizes = [layer.pixels for layer in layers]
                if any(layer.name not in nodes for layer in layers) or sizes != sorted(sizes, reverse=True):
                    continue
                if len(layers) < 2 or (len(set(sizes)) == 1 and len(layers) == 2):
                    continue  # two maps of one resolution are logits and auxiliary logits
                ends = [nodes[layer.name] for layer in layers]
                whole = len(layers) >= len(stages) or len(set(sizes)) >= len({u.layer.pixels for u in stages})
                if whole and all(self._is_of(n, needed) for n in ends):
                    found.append((call.module, layers, ""))
                elif self._exchange(layers, ends):
                    found.append((call.module, layers, _EXCHANGE))
        if not found:
            return None
        most = max(len({layer.size for layer in layers}) for _, layers, _ in found)
        found = [f for f in found if len({layer.size for layer in f[1]}) == most]
        outer = [f for f in found if not any(_inside(f[0], module) for module, _, _ in found)]
        _, layers, doubt = max(outer, key=lambda f: len(f[1]))
        return layers, doubt

    def _is_of(self, n: int, needed: set[int]) -> bool:
        """Whether a node is in the encoder, or is computed from it without another product with weights."""
        return n not in self.logits and not any(self.graph.kernel[m] for m in self.graph.ancestors([n], stop=needed))

    def _exchange(self, layers: list[Layer], ends: list[int]) -> bool:
        """Whether maps are the parallel branches of a network such as HRNet.

        No branch is computed from another, and the coarsest one, which is also the model's coarsest map so far, depends
        on an operation that raises the resolution.
        """
        sizes, widths = [layer.pixels for layer in layers], [layer.channels for layer in layers]
        if len(layers) < 3 or len(set(sizes)) < len(sizes) or any(b <= a for a, b in pairwise(widths)):
            return False
        needed = self.graph.ancestors([ends[-1]])
        if any(n in self.logits for n in ends) or self.turn[ends[-1]] == float("inf"):
            return False
        if any(b in self.graph.ancestors([a]) for a in ends for b in ends if a != b):
            return False
        return not any(
            node in needed and layer.pixels < sizes[-1] and not self._is_hidden(call, layer, node)
            for call, layer, node in self.candidates
        )

    def _check(self, trunk: list[_Unit], stages: list[_Unit]) -> tuple[list[Layer], str]:
        """The trunk's stages, or an error if these maps cannot be stages."""
        if not trunk:
            raise NotFound("the maps of the encoder cannot be told from those of a decoder or head")
        work: dict[int, int] = {}
        for u in trunk:
            work[u.layer.pixels] = work.get(u.layer.pixels, 0) + len(u.kernels)
        most = max(work, key=lambda pixels: work[pixels])
        plain = work[most] >= _PLAIN * sum(work.values()) and sum(work.values()) > MAX_LAYERS
        if plain and len(trunk) > 1:
            depths = [u for u in trunk if u.layer.pixels == most and u.layer.stride >= _MIN_STRIDE]
            blocks = [u for u in depths if len(u.kernels) > 1] or depths
            read = self._read_elsewhere(blocks)
            if len(read) > 2:
                return [u.layer for u in read[-MAX_LAYERS:]], ""
            places = [len(blocks) * (i + 1) // MAX_LAYERS - 1 for i in range(MAX_LAYERS)]
            raise NotFound(
                f"at least nine tenths of the layers work at stride {depths[-1].layer.stride if depths else 1}, as in "
                "a plain transformer, which has depths but no stages",
                list(dict.fromkeys(blocks[i].layer.name for i in places if i >= 0)),
            )
        layers = [u.layer for u in stages]
        if len({layer.size for layer in layers}) < 2:
            last = {u.layer.size: u.layer.name for u in trunk}
            raise NotFound(
                "expected at least two stages of stride 4 or more, each coarser than the one before",
                list(last.values()) if len(last) > 1 else (),
            )
        if any(_step(b, a) > _MAX_STEP + 0.5 for a, b in pairwise(layers)):
            raise NotFound("the resolution falls to less than a quarter in one step")
        return layers, self._doubt(trunk, stages)

    def _read_elsewhere(self, blocks: list[_Unit]) -> list[_Unit]:
        """The blocks whose output is read by more than the next block, for example by a decoder."""
        needed = self.graph.ancestors([blocks[-1].node]) if blocks else set()
        read = {s for n, sources in enumerate(self.graph.sources) if n not in needed for s in sources}
        return [u for u in blocks if u.node in read]

    def _doubt(self, trunk: list[_Unit], stages: list[_Unit]) -> str:
        """A sentence about what is not certain about the stages, or ""."""
        passed = [repr(u.layer.name) for u in stages if not u.certain]
        if passed:
            return _BYPASSED.format(", ".join(passed))
        last = [u for u in trunk if u.kernels and u.layer.size == stages[-1].layer.size]
        finer = [u for u in stages if u.layer.size != stages[-1].layer.size]
        if len(last) > 1 and not self._related(last[-1], finer[-1]) and not self._same_kind(last[-1], last[-2]):
            return _SAME.format(repr(last[-1].layer.name), repr(last[-2].layer.name))
        return ""

    def _same_kind(self, a: _Unit, b: _Unit) -> bool:
        return self.calls[a.layer.module].kind == self.calls[b.layer.module].kind

    @staticmethod
    def _related(a: _Unit, b: _Unit) -> bool:
        """Whether two modules' names are equal without their numbers, or one name then continues the other."""
        first, second = sorted((_pattern(a), _pattern(b)), key=len)
        return f"{second}.".startswith(f"{first}.")
