"""State dicts of other libraries' models as ours and back, by rules that say which of their tensors one of ours is.

A rule works in both directions, so a model that was read can be written: ``to_ours(rules, theirs, ours)`` and
``to_theirs(rules, ours)`` are each other's inverse. What is read must have the shapes that would be written.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

State = Mapping[str, Tensor]

_MISFIT = "the state dict does not fit the model"


@dataclass(frozen=True)
class Rule:
    """One tensor of ours is one of theirs, or several of theirs one after the other.

    Args:
        ours: its name in our state dict; empty for a tensor of theirs that we do not keep.
        theirs: names in their state dict, in the order in which their rows follow each other in ours.
        sizes: rows of each, where there are several.
        read, write: their tensors as they stand in ours, and back: inverse functions, the same for all of ``theirs``.
        value: gives what we do not keep, when it is written (a buffer that follows from the sizes). What is read may lack it;
            its values are ignored, but not its shape.
        rows: first row and row past the last, where ours is a part of one of theirs; the rules of its parts follow their order.
        same_as: for a tensor of theirs that we do not keep: the name of the one whose weights it shares.
    """

    ours: str
    theirs: tuple[str, ...]
    sizes: tuple[int, ...] = ()
    read: Callable[[Tensor], Tensor] | None = None
    write: Callable[[Tensor], Tensor] | None = None
    value: Callable[[], Tensor] | None = None
    rows: tuple[int, int] | None = None
    same_as: str | None = None


def renamed(ours: str, theirs: str, *kinds: str) -> list[Rule]:
    """``ours.kind`` is ``theirs.kind`` for every kind; without kinds, ``ours`` is ``theirs``."""
    return [Rule(f"{ours}.{kind}", (f"{theirs}.{kind}",)) for kind in kinds] or [Rule(ours, (theirs,))]


def affine(ours: str, theirs: str, bias: bool = True) -> list[Rule]:
    """A linear layer, LayerNorm or convolution."""
    return renamed(ours, theirs, *(("weight", "bias") if bias else ("weight",)))


def stacked(ours: str, theirs: Sequence[str], sizes: Sequence[int], bias: bool = True) -> list[Rule]:
    """A linear layer of ours whose rows are several of theirs, with ``sizes`` rows each."""
    kinds = ("weight", "bias") if bias else ("weight",)
    return [Rule(f"{ours}.{kind}", tuple(f"{name}.{kind}" for name in theirs), tuple(sizes)) for kind in kinds]


def parted(ours: Sequence[str], theirs: str, sizes: Sequence[int], bias: bool = True) -> list[Rule]:
    """Several linear layers of ours, with ``sizes`` rows each, whose rows are those of one of theirs, in this order."""
    kinds, rules, start = ("weight", "bias") if bias else ("weight",), [], 0
    for name, size in zip(ours, sizes, strict=True):
        rules += [Rule(f"{name}.{kind}", (f"{theirs}.{kind}",), rows=(start, start + size)) for kind in kinds]
        start += size
    return rules


def under(ours: str, theirs: str, rules: Iterable[Rule]) -> list[Rule]:
    """The rules of a part, which lies at prefixes ``ours`` and ``theirs`` (each with its dot, or empty)."""
    return [
        replace(
            rule,
            ours=rule.ours and ours + rule.ours,
            theirs=tuple(theirs + name for name in rule.theirs),
            same_as=rule.same_as and theirs + rule.same_as,
        )
        for rule in rules
    ]


def under_each(ours: str, theirs: Sequence[str], rules: Sequence[Rule]) -> list[Rule]:
    """``under`` for a part of ours whose weights several of theirs share, at the prefixes ``theirs``."""
    names = dict.fromkeys(name for rule in rules for name in rule.theirs)
    shared = [Rule("", (other + name,), same_as=theirs[0] + name) for other in theirs[1:] for name in names]
    return under(ours, theirs[0], rules) + shared


def _complain(
    title: str, lacking: Iterable[str], besides: Iterable[str], wrong: Iterable[str] = (), unlike: Iterable[str] = ()
) -> None:
    lines = [f"  {kind}: {', '.join(names)}" for kind, names in (
        ("it lacks", sorted(lacking)), ("it has besides", sorted(besides)), ("of wrong shape", sorted(wrong)),
        ("of shared weights that differ", sorted(unlike)),
    ) if names]  # fmt: skip
    if lines:
        raise ValueError("\n".join((title, *lines)))


def to_ours(rules: Sequence[Rule], theirs: State, ours: State) -> dict[str, Tensor]:
    """Their state dict as ours; a tensor of one of theirs is theirs, not a copy.

    What shares its weights may be missing, as files leave it out.

    Args:
        ours: the model's state dict, of which only names and shapes matter.

    Raises:
        ValueError: it lacks names, has others, or wrong shapes, or weights that ours shares differ; the message lists all of
            them under their names.
    """
    known = {name for rule in rules for name in rule.theirs}
    needed = {name for rule in rules if rule.ours for name in rule.theirs}
    wrong = _misshapen(theirs, _their_shapes(rules, ours))
    _complain(_MISFIT, needed - theirs.keys(), theirs.keys() - known, wrong, _unlike(rules, theirs))
    result: dict[str, Tensor] = {}
    for rule in rules:
        if not rule.ours:
            continue
        parts = [theirs[name] if rule.read is None else rule.read(theirs[name]) for name in rule.theirs]
        whole = parts[0] if len(parts) == 1 else torch.cat(parts)
        result[rule.ours] = whole if rule.rows is None else whole[slice(*rule.rows)]
    return result


def _their_shapes(rules: Sequence[Rule], ours: State) -> dict[str, torch.Size]:
    """Shapes of what is written; on meta, where neither copies nor buffers cost anything."""
    with torch.device("meta"):
        written = to_theirs(rules, {name: tensor.to("meta") for name, tensor in ours.items()})
    return {name: tensor.shape for name, tensor in written.items()}


def _misshapen(state: State, shapes: Mapping[str, torch.Size]) -> list[str]:
    """Names whose tensors have other shapes, with both."""
    return [
        f"{name} {tuple(state[name].shape)} instead of {tuple(shape)}"
        for name, shape in shapes.items()
        if name in state and state[name].shape != shape
    ]


def _unlike(rules: Sequence[Rule], theirs: State) -> list[str]:
    """Names of theirs whose values are not those of the tensors that they must be again; on meta there are none."""
    pairs = ((rule.theirs[0], rule.same_as) for rule in rules if rule.same_as is not None)
    return [
        f"{name} from {other}"
        for name, other in pairs
        if name in theirs and other in theirs and not theirs[name].is_meta and not torch.equal(theirs[name], theirs[other])
    ]


def to_theirs(rules: Sequence[Rule], ours: State) -> dict[str, Tensor]:
    """Our state dict as theirs.

    Raises:
        ValueError: it lacks names, or has others; the message lists all of them.
    """
    known = {rule.ours for rule in rules if rule.ours}
    _complain("our state dict does not fit theirs", known - ours.keys(), ours.keys() - known)
    result: dict[str, Tensor] = {}
    for rule in rules:
        if rule.ours:
            whole = ours[rule.ours]
            parts = whole.split(rule.sizes) if rule.sizes else (whole,)
            written = [part if rule.write is None else rule.write(part) for part in parts]
            if rule.rows is not None and rule.rows[0]:
                written = [torch.cat((result[rule.theirs[0]], written[0]))]
            result.update(zip(rule.theirs, written, strict=True))
        elif rule.same_as is not None:
            result[rule.theirs[0]] = result[rule.same_as]
        elif rule.value is not None:
            result.update((name, rule.value()) for name in rule.theirs)
    return result


def check_shapes(state: State, model_state: State) -> None:
    """Raise unless ``state`` has the names and shapes of ``model_state``; the message lists all that differ."""
    wrong = _misshapen(state, {name: tensor.shape for name, tensor in model_state.items()})
    _complain(_MISFIT, model_state.keys() - state.keys(), state.keys() - model_state.keys(), wrong)
