"""Figures of activation shifts: each takes the result, a position rule and a fine-tune; thin lines are cases, thick ones their mean."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from statistics import fmean
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

OURS, UNRELATED, OTHERS, CEILING, COMPONENTS = "#b2182b", "#2166ac", "#e08214", "black", "#762a83"
LAWS = {
    "haar": ("#bdbdbd", "random"),
    "base_covariance": ("#7fbf7b", "random, covariance of activations"),
    "shift_covariance": ("#d8b365", "random, covariance of the shifts"),
}
Line = tuple[list[int], list[float]]


def draw_shift_subspace(
    result: Mapping[str, Any], positions: str | None = None, *, tuned: str | None = None, centred: bool = True, ax: Axes | None = None
) -> Axes:
    """Share of evaluation shifts that the training shifts' subspace holds, by layer, with nulls, ceiling and other fine-tunes."""
    ax, which = _axes(ax), "centred" if centred else "uncentred"
    cases = [[p for p in places if "undefined" not in p[which]] for places in _cases(result, positions, tuned)]
    for law, (colour, said) in LAWS.items():
        bands = [[p[which]["measures"]["projection_fraction"]["nulls"].get(law) for p in places] for places in cases]
        _band(ax, cases, bands, colour, said)
    lines: dict[str, tuple[str, str, Callable[[Mapping[str, Any]], float | None]]] = {
        "evaluation shifts": (OURS, "-", lambda f: f["measures"]["projection_fraction"]["value"]),
        "ceiling: other half of training": (CEILING, ":", lambda f: f["halves"].get("ceiling")),
        "components of activations": (COMPONENTS, "-.", lambda f: f["activation_components"]["projection_fraction"]),
    }
    for name, (colour, style, value) in lines.items():
        _lines(ax, [_line(places, lambda p, v=value: v(p[which])) for places in cases], colour, name, style)  # type: ignore[misc]
    for good, colour, name in ((True, UNRELATED, "aligned control's shifts"), (False, OTHERS, "other fine-tunes' shifts")):
        found = [_line(places, lambda p, u=good: _held(p, which, unrelated=u)) for places in cases]  # type: ignore[misc]
        _lines(ax, found, colour, name, "-")
    ax.set_ylabel(f"projection fraction, {which}")
    return _by_layer(ax, cases)


def draw_shift_sizes(
    result: Mapping[str, Any], positions: str | None = None, *, tuned: str | None = None, layer: int | None = None, ax: Axes | None = None
) -> Axes:
    """The same at one layer over the number of dimensions, about the mean; shaded, what 97.5 % of random subspaces stay below."""
    ax = _axes(ax)
    places = [place for case in _cases(result, positions, tuned) for place in case]
    shown = layer if layer is not None else max(place["layer"] for place in places)
    curves = [sorted(p["sizes"], key=lambda s: s["k"]) for p in places if p["layer"] == shown]
    for law, (colour, said) in LAWS.items():
        found = [[s for s in curve if law in s["null_high"]] for curve in curves]
        _lines(ax, [([s["k"] for s in curve], [s["null_high"][law] for s in curve]) for curve in found], colour, f"{said}, 97.5 %", "--")
    _lines(ax, [([s["k"] for s in curve], [s["projection_fraction"] for s in curve]) for curve in curves], OURS, "evaluation shifts", "-")
    ax.set_xscale("log", base=2)
    ax.set_xlabel(f"dimensions (layer {shown})")
    ax.set_ylabel("projection fraction, centred")
    ax.set_ylim(0, 1.02)
    return ax


def draw_mean_shift(result: Mapping[str, Any], positions: str | None = None, *, tuned: str | None = None, ax: Axes | None = None) -> Axes:
    """Cosine of evaluation shifts with the mean training shift, and of other fine-tunes' mean shifts with it."""
    ax, cases = _axes(ax), _cases(result, positions, tuned)
    for law in ("haar", "base_covariance"):
        bands = [[{"low": -(n := p["mean_shift"]["mean_cosine"]["nulls"][law])["high"], "high": n["high"]} for p in c] for c in cases]
        _band(ax, cases, bands, *LAWS[law])
    _lines(ax, [_line(c, lambda p: p["mean_shift"]["mean_cosine"]["value"]) for c in cases], OURS, "evaluation shifts", "-")
    for good, colour, name in ((True, UNRELATED, "aligned control's mean"), (False, OTHERS, "other fine-tunes' means")):
        _lines(ax, [_line(c, lambda p, u=good: _mean_cosine(p, unrelated=u)) for c in cases], colour, name, "-")  # type: ignore[misc]
    ax.set_ylabel("cosine with the mean training shift")
    return _by_layer(ax, cases, low=-1.02)


def draw_prompt_correlation(
    result: Mapping[str, Any], positions: str | None = None, *, tuned: str | None = None, ax: Axes | None = None
) -> Axes:
    """Correlation over prompts of prompt overlap with shift similarity, beside that of overlap with random subspaces."""
    ax = _axes(ax)
    cases = [[p for p in c if "undefined" not in p["correlations"]["mean_cosine"]] for c in _cases(result, positions, tuned)]
    for law in ("haar", "base_covariance"):
        _band(ax, cases, [[p["correlations"]["mean_cosine"]["random_subspaces"][law] for p in c] for c in cases], *LAWS[law])
    named = (("mean_cosine", OURS, "cosine with the mean shift"), ("centred_fraction", COMPONENTS, "projection fraction, centred"))
    for name, colour, said in named:
        _lines(ax, [_line(c, lambda p, n=name: p["correlations"][n].get("pearson", {}).get("value")) for c in cases], colour, said, "-")  # type: ignore[misc]
    ax.axhline(0, color="black", lw=0.6)
    ax.set_ylabel("r with prompt overlap")
    return _by_layer(ax, cases, low=-1.02)


def draw_predicted_activations(
    result: Mapping[str, Any], positions: str | None = None, *, tuned: str | None = None, ax: Axes | None = None
) -> Axes:
    """Cosine about the mean of predicted with true activations after: nothing added, the mean training shift, a random vector."""
    ax = _axes(ax)
    cases = [[p for p in c if "undefined" not in p["predicted"]] for c in _cases(result, positions, tuned)]
    for law in ("haar", "base_covariance"):
        _band(ax, cases, [[p["predicted"]["nulls"]["centred_cosine"][law] for p in c] for c in cases], *LAWS[law])
    for dose, colour, said, style in (("0", "black", "nothing added", "--"), ("1", OURS, "mean training shift", "-")):
        _lines(ax, [_line(c, lambda p, d=dose: p["predicted"]["doses"][d]["centred_cosine"]["value"]) for c in cases], colour, said, style)  # type: ignore[misc]
    _lines(ax, [_line(c, lambda p: _control(p)) for c in cases], UNRELATED, "aligned control's, same norm", "-")
    ax.set_ylabel("centred cosine with the true activations")
    return _by_layer(ax, cases, low=None)


def shifts_figure(result: Mapping[str, Any]) -> Figure:
    """A row of pictures for each fine-tune and position rule."""
    from matplotlib.figure import Figure

    kinds = dict.fromkeys((c["tuned"], p["positions"]) for c in result["cases"] for p in c["places"] if "undefined" not in p)
    drawn = {
        draw_shift_subspace: "share in the training shifts' subspace",
        draw_shift_sizes: "the same over sizes",
        draw_mean_shift: "along the mean shift",
        draw_prompt_correlation: "prompt overlap and shift",
        draw_predicted_activations: "activations predicted",
    }
    figure = Figure(figsize=(4.2 * len(drawn), 4.6 * len(kinds) + 0.3), layout="constrained")
    axes = figure.subplots(len(kinds), len(drawn), squeeze=False)
    for (tuned, rule), row in zip(kinds, axes, strict=True):
        for (draw, title), ax in zip(drawn.items(), row, strict=True):
            draw(result, rule, tuned=tuned, ax=ax)
            ax.set_title(f"{tuned}, {rule}:\n{title}", fontsize=8.5, loc="left")
            ax.spines[["top", "right"]].set_visible(False)
            ax.legend(fontsize=6, frameon=False, loc="upper center", bbox_to_anchor=(0.5, -0.14), ncol=2, columnspacing=1, handlelength=1.5)
    return figure


def _axes(ax: Axes | None) -> Axes:
    from matplotlib.figure import Figure

    return ax if ax is not None else Figure(figsize=(5, 4), layout="constrained").subplots()


def _cases(result: Mapping[str, Any], positions: str | None, tuned: str | None) -> list[list[Mapping[str, Any]]]:
    """Places of one rule in each case of one fine-tune (by default the first of each), those that are defined, by layer."""
    rule = positions if positions is not None else result["cases"][0]["places"][0]["positions"]
    name = tuned if tuned is not None else result["cases"][0]["tuned"]
    cases = [case["places"] for case in result["cases"] if case["tuned"] == name]
    found = [[p for p in places if p["positions"] == rule and "undefined" not in p] for places in cases]
    return [places for places in found if places]


def _line(places: Sequence[Mapping[str, Any]], value: Callable[[Mapping[str, Any]], float | None]) -> Line:
    pairs = [(p["layer"], found) for p in places if (found := value(p)) is not None]
    return [x for x, _ in pairs], [y for _, y in pairs]


def _lines(ax: Axes, lines: Sequence[Line], colour: str, name: str, style: str) -> None:
    """Each case thin, and the mean thick, where all have a number: a mean of others at every place would jump between them."""
    lines = [line for line in lines if line[0]]
    if not lines:
        return
    for x, y in lines:
        ax.plot(x, y, color=colour, lw=0.7, alpha=0.5, ls=style)
    places = sorted(set.intersection(*(set(xs) for xs, _ in lines)))
    mean = [fmean(y for xs, ys in lines for x, y in zip(xs, ys, strict=True) if x == place) for place in places]
    ax.plot(places, mean, color=colour, lw=2, ls=style, marker="o", ms=2.5, label=name)


def _band(ax: Axes, cases: Sequence[Sequence[Mapping[str, Any]]], bands: Sequence[Sequence[Any]], colour: str, name: str) -> None:
    """The middle 95 % of a null, from the lowest end of any case to the highest."""
    ends: dict[int, list[Mapping[str, float]]] = {}
    for places, found in zip(cases, bands, strict=True):
        for place, null in zip(places, found, strict=True):
            if null is not None:
                ends.setdefault(place["layer"], []).append(null)
    layers = sorted(ends)
    if layers:
        low, high = [min(n["low"] for n in ends[x]) for x in layers], [max(n["high"] for n in ends[x]) for x in layers]
        ax.fill_between(layers, low, high, color=colour, alpha=0.45, lw=0.8, label=name)


def _by_layer(ax: Axes, cases: Sequence[Sequence[Mapping[str, Any]]], low: float | None = 0.0) -> Axes:
    layers = sorted({place["layer"] for places in cases for place in places})
    ax.set_xlabel("layer")
    if len(layers) <= 12:
        ax.set_xticks(layers)
    if low is not None:
        ax.set_ylim(low, 1.02)
    return ax


def _others(place: Mapping[str, Any], names: Mapping[str, Any], *, unrelated: bool) -> list[Any]:
    return [found for name, found in names.items() if (name in place["unrelated"]) == unrelated and "undefined" not in found]


def _held(place: Mapping[str, Any], which: str, *, unrelated: bool) -> float | None:
    found = [other["in_this"]["value"] for other in _others(place, place[which]["others"], unrelated=unrelated)]
    return fmean(found) if found else None


def _mean_cosine(place: Mapping[str, Any], *, unrelated: bool) -> float | None:
    found = [other["cosine_of_means"] for other in _others(place, place["mean_shift"]["others"], unrelated=unrelated)]
    known = [value for value in found if value is not None]
    return fmean(known) if known else None


def _control(place: Mapping[str, Any]) -> float | None:
    found = [other["centred_cosine"] for other in _others(place, place["predicted"]["others"], unrelated=True)]
    return fmean(found) if found else None
