"""A hand-defined model becomes an engine: the graph of one step, and its weights as arrays."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from penstock.compiler import pipeline
from penstock.compiler.backend import Unplanned
from penstock.compiler.build import Frontend, finish, step_graphs
from penstock.compiler.candidates import Pins
from penstock.compiler.footprint import require_room
from penstock.compiler.identity import compiler_facts, digest, text_facts
from penstock.compiler.lower import lower
from penstock.compiler.phases import prepare_graph
from penstock.compiler.progress import Progress, silent
from penstock.compiler.timing_cache import cache_root
from penstock.compiler.work import work_of
from penstock.engine import store
from penstock.engine.device import Device
from penstock.engine.groups import BY_SLOT, StateGroup, groups_of
from penstock.engine.manifest import Engine
from penstock.engine.profile import Profile
from penstock.errors import CheckpointError, GraphError, OptionError
from penstock.formats import parse
from penstock.ir.graph import Graph, Node, Type, Value
from penstock.ir.lazy import torch
from penstock.ir.op import get
from penstock.ir.ops.state import table_name
from penstock.kernels.device import detect
from penstock.models.checkpoint import Checkpoint
from penstock.models.config import MAX_SIZE
from penstock.plugins import load as load_plugins
from penstock.spec import ModelSpec
from penstock.text.files import text_files

LOGITS = "logits"
NO_PINS: Pins = {}
LOOKING = ("attention", "rope_attention")  # ops that look through a window
_GROUP = re.compile(r"(paged|windowed|slots)(0|[1-9][0-9]{0,3})")


@dataclass(frozen=True)
class Arrays(Checkpoint):
    """Torch tensors in memory as those of a checkpoint."""

    held: Mapping[str, Any] = field(default_factory=dict)

    def read(self, name: str, format: str | None = None) -> Any:
        found = self.held[name].detach().cpu()
        return found if format is None else found.to(getattr(torch, parse(format).torch_dtype))


def compile(
    graph: Graph, weights: Mapping[str, Any], profile: Profile, *, output: str | Path | None = None,
    eos: Sequence[int] = (), tokenizer: str | Path | None = None, device: str = "auto", tactics: Pins = NO_PINS,
    plugins: Sequence[str] = (), cache_dir: str | Path | None = None, progress: Progress = silent,
) -> Engine:  # fmt: skip
    """A hand-defined model to an engine; `LLM(engine)` runs it, and its `directory` stands alone.

    graph: one step, of ops of `penstock.ir`. Its inputs are those that a step brings (tokens, positions, rows,
    query_start, query_len, context_len, block_table, logit_rows), its results "logits", f32[L,V], and each state under
    its own name. weights: a numpy or torch array for each `tensor` leaf, by name; converted to the leaf's format.
    profile: the limits it is made for. output: the engine's directory; None: in the cache. eos: ids that end a text.
    tokenizer: a directory of tokenizer files to go with it; None: token ids in and out. The rest as for `LLM`.

    Raises GraphError, CheckpointError, PluginError or OptionError before any work, SelectionError where no tactic runs
    an op.
    """
    _check_arguments(graph, weights, profile, eos, tactics, (output, tokenizer, cache_dir))
    load_plugins(plugins)
    target, root, text = detect(device), cache_root(cache_dir), None if tokenizer is None else Path(tokenizer)
    if text is not None and not text_files(text):
        raise OptionError(f"tokenizer={str(text)!r} has no tokenizer file; name a directory with tokenizer.json")
    front = _front(graph, weights, profile, eos, tactics)
    require_room(front.draft, target)
    key = _key(front, weights, text, target)
    place = root / "engines" / f"compiled-{key}" if output is None else Path(output)
    return store.load(finish(front, key, text, place, output is None, target, root, tactics, {}, progress))


def _check_arguments(graph: Any, weights: Any, profile: Any, eos: Any, tactics: Any, places: Sequence[Any]) -> None:
    """Raises OptionError for what is of another type altogether."""
    wanted: tuple[tuple[str, Any, tuple[type, ...]], ...] = (
        ("graph", graph, (Graph,)), ("weights", weights, (Mapping,)), ("profile", profile, (Profile,)),
        ("eos", eos, (list, tuple)), ("tactics", tactics, (Mapping,)),
    )  # fmt: skip
    for name, value, kinds in wanted:
        if not isinstance(value, kinds):
            shown = " or ".join(kind.__name__ for kind in kinds)
            raise OptionError(f"{name} is a {type(value).__name__}, expected a {shown}; see the help of compile")
    for place in places:
        if not isinstance(place, str | Path | None):
            raise OptionError(f"{place!r} is a {type(place).__name__}, and no path; give a directory's name")


def _front(graph: Graph, weights: Mapping[str, Any], profile: Profile, eos: Sequence[int], tactics: Pins) -> Frontend:
    if profile.freqs:
        raise OptionError(f"profile.freqs={profile.freqs}: a graph by hand brings its own frequencies; leave it out")
    for node in graph.leaves("state"):
        _check_state(node, profile)
    groups = groups_of(graph.leaves("state"))
    _check_groups(graph, groups)
    profile = profile.for_groups(groups)
    vocab = _check_step(graph, profile)
    held = _arrays(graph, weights)
    if bad := [token for token in eos if type(token) is not int or not 0 <= token < vocab]:
        raise OptionError(f"eos={list(eos)!r} holds {bad[0]!r}, which is no token id from 0 to {vocab - 1}")
    after, results = pipeline.run(graph)
    lowered = lower(after)
    spec = ModelSpec((), vocab, _hidden(graph), None, profile.max_seq_len)  # the graph alone says what its layers are
    source = {"model": "a graph given to penstock.compile", "weights": "arrays", "config": {}, "tactics": dict(tactics)}
    draft = Unplanned(
        spec.to_json(), profile, _format(graph), step_graphs(profile, vocab, lowered.graph), lowered.weights, source,
        {"eos": list(eos), "generation": {}}, work_of(lowered.graph, profile), pipeline.report(results),
    )  # fmt: skip
    return Frontend(draft, graph, after, Arrays(Path(), {}, held=held))


def _key(front: Frontend, weights: Mapping[str, Any], text: Path | None, device: Device) -> str:
    """Identity: graph, what the weights hold, limits, ends, pins, tokenizer, device and compiler."""
    draft = front.draft
    held = {name: _content(array) for name, array in weights.items()}
    facts = [front.before.key(), draft.profile.to_json(), held, dict(draft.tokens), dict(draft.source)]
    return digest([*facts, text_facts(text) if text else {}, compiler_facts(device)])


def _check_step(graph: Graph, profile: Profile) -> int:
    """The size of the vocabulary. Raises GraphError where the graph is not one step of a model in this profile."""
    prepared = prepare_graph(profile)
    given = {name: _by_table(v.type, profile) for name, v in zip(prepared.names, prepared.outputs, strict=True)}
    for node in graph.leaves("input"):
        if given.get(node.name) != _by_table(node.types[0], profile):
            known = ", ".join(f"{name} {type}" for name, type in given.items() if name != "slots")
            raise GraphError(f"input {node.name!r} of type {node.types[0]} is not what a step brings; it has {known}")
    results = dict(zip(graph.names, graph.outputs, strict=True))
    logits = results.pop(LOGITS, None)
    shape = logits.type.shape if logits else ()
    sized = len(shape) == 2 and shape[0] == "L" and isinstance(shape[1], int)
    if logits is None or not sized or logits.type.format.name != "f32":
        raise GraphError(f"the graph gives {logits and logits.type} as 'logits'; a step has to give f32[L,V]")
    states = {node.name: node for node in graph.leaves("state")}
    if results.keys() != states.keys() or any(v.type != states[n].types[0] for n, v in results.items()):
        raise GraphError(f"results {sorted(results)} beside 'logits' are not the graph's states, {sorted(states)}")
    if wrong := graph.leaves("weight"):
        raise GraphError(f"leaf {wrong[0].name!r} is a 'weight', which compiling makes; give a 'tensor'")
    if not states:
        raise GraphError("the graph has no state; a step of a model leaves keys and values for those that follow")
    return int(shape[1])


def _by_table(type: Type, profile: Profile) -> Type:
    """With M for the blocks of a table's row, which is what graphs call them."""
    first, *rest = type.shape or (0,)
    return Type((first, *("M" if d == profile.table_width else d for d in rest)), type.format) if rest else type


def _check_state(node: Node, profile: Profile) -> None:
    shape, attrs = node.types[0].shape, dict(node.attrs)
    window = attrs.get("window", 0)
    kind = found[1] if (found := _GROUP.fullmatch(str(attrs.get("group")))) else ""
    blocks = kind == BY_SLOT or (len(shape) == 5 and shape[3] == profile.block_size)
    sized = shape[:1] == ("N",) and all(isinstance(n, int) and n > 0 for n in shape[1:])
    wide = type(window) is int and (0 < window <= MAX_SIZE if kind == "windowed" else window == 0)
    if not kind or not sized or not blocks or not wide:
        raise GraphError(
            f"state {node.name!r} is {node.types[0]} {attrs}; give [N,2,K,{profile.block_size},D], blocks as large as "
            f"the profile's, and as the attribute `group` the name of its group: paged0, windowed1 (with `window`), ..."
        )


def _check_groups(graph: Graph, groups: Sequence[StateGroup]) -> None:
    """Raises GraphError where groups share a number, a state is read by another group's table, or further back than its
    group keeps blocks: all would run, on another's keys."""
    if any(group.name != f"{group.kind}{i}" for i, group in enumerate(groups)):
        shared = len({group.name.removeprefix(group.kind) for group in groups}) < len(groups)
        said = ", ".join(f"{group.name} (window {group.window})" for group in groups)
        what = "groups of states share a number:" if shared else "the groups of states are"
        raise GraphError(f"{what} {said}; number them from 0 on, each with one window")
    paged = (group for group in groups if not group.by_slot)
    own = {state: (table_name(i), group) for i, group in enumerate(paged) for state in group.states}
    for node in graph.nodes:
        for state in filter(None, map(_state, node.inputs)):
            if state in own:
                _check_reader(node, *own[state])


def _check_reader(node: Node, table: str, group: StateGroup) -> None:
    names = [v.node.name for v in node.inputs if v.node.op == "input"]
    if wrong := [name for name in names if name.startswith("block_table") and name != table]:
        raise GraphError(
            f"{node.op} finds a state of group {group.name} by {wrong[0]!r}; the group's table is {table!r}"
        )
    window = int(str(dict(node.attrs).get("window", 0)))
    if group.window and node.op in LOOKING and not 0 < window <= group.window:
        kept = f"a state of group {group.name}, which keeps {group.window} tokens"
        raise GraphError(f"{node.op} has window {window} over {kept}; give both the same")


def _state(value: Value) -> Node | None:
    """The state that a value is, perhaps after some steps of its life."""
    node = value.node
    if node.is_leaf:
        return node if node.op == "state" else None
    kept = (i for i, out in (get(node.op).writes or {}).items() if node[out] == value)
    return next((_state(node.inputs[i]) for i in kept), None)


def _arrays(graph: Graph, weights: Mapping[str, Any]) -> dict[str, Any]:
    """The weights as torch tensors. Raises CheckpointError for one missing, misshapen, left over or no array."""
    wanted = {node.name: node.types[0] for node in graph.leaves("tensor")}
    if missing := [name for name in wanted if name not in weights]:
        raise CheckpointError(f"weights lack {', '.join(missing[:5])}, which the graph reads")
    if left := [name for name in weights if name not in wanted]:
        raise CheckpointError(
            f"weights hold {', '.join(map(str, left[:5]))}, which the graph does not read; leave them out"
        )
    found: dict[str, Any] = {}
    for name, type in wanted.items():
        try:
            found[name] = torch.as_tensor(weights[name])
        except (TypeError, ValueError, RuntimeError) as error:
            raise CheckpointError(f"weight {name!r} is no array: {error}; give numpy's or torch's") from None
        if found[name].layout != torch.strided or found[name].is_meta:
            raise CheckpointError(f"weight {name!r} is sparse, or a type without numbers; give a dense array")
        if tuple(found[name].shape) != type.shape or found[name].is_floating_point() != type.format.is_float:
            raise CheckpointError(f"weight {name!r} is {found[name].dtype}{list(found[name].shape)}, not {type}")
    return found


def _content(array: Any) -> str:
    """A hash of type and bytes."""
    data = torch.as_tensor(array).detach().cpu().contiguous()
    return hashlib.sha256(str(data.dtype).encode() + data.reshape(-1).view(torch.uint8).numpy().tobytes()).hexdigest()


def _activations(graph: Graph) -> Iterator[Node]:
    """What has a row of floats for each token."""
    return (n for n in graph.nodes if n.types[0].shape[:1] == ("T",) and n.types[0].format.is_float)


def _format(graph: Graph) -> str:
    return next((node.types[0].format.name for node in _activations(graph)), "f32")


def _hidden(graph: Graph) -> int:
    return next((int(node.types[0].shape[-1]) for node in _activations(graph)), 1)
