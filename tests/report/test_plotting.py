"""Pictures: what they show, read back from the figure, and what they refuse."""

import sys

import pytest

from hf_cuttlefish.decide.plan import RankDecision, RankPlan
from hf_cuttlefish.report import plan_plots
from hf_cuttlefish.report.plotting import plot_accuracy, plot_loss, plot_ranks, plot_spectra, plot_stable_ranks

KINDS = ("attention.self.query", "attention.output.dense", "output.dense")
NAMES = [f"encoder.layer.{i}.{kind}" for i in range(3) for kind in KINDS]
HISTORY = [{"step": s, "layer": n, "stable_rank": 10 + i + s / 10} for s in (0, 5, 10) for i, n in enumerate(NAMES)]
PLAN = RankPlan({n: RankDecision(64, 32, None if i == 4 else 8 + i, "rule") for i, n in enumerate(NAMES)})
SPECTRA = {name: [2.0, 1.0, *[0.1] * 30] for name in NAMES}
LOG = [{"step": s, "loss": 2 - s / 20} for s in range(1, 21)] + [
    {"step": 10, "eval_loss": 1.6},
    {"step": 20, "epoch": 1.0},
]


def texts(figure):
    """All that can be read in a figure."""
    return [t.get_text() for t in figure.findobj(lambda o: hasattr(o, "get_text")) if t.get_text()]


def test_stable_ranks_show_medians_change_and_switch():
    upper, lower = plot_stable_ranks(HISTORY, switch_step=12).axes
    lines = {line.get_label(): line for line in upper.lines}
    medians = sorted(line.get_ydata()[0] for line in upper.lines[:3])
    assert medians == [13, 14, 15] and len(lines) == 4  # the middle one of three layers, and the switch
    changes = sorted(line.get_ydata()[-1] for line in lower.lines[:3])
    assert changes == pytest.approx([100 / m for m in (15, 14, 13)])
    assert upper.lines[3].get_xdata() == [12, 12] and upper.get_xlim()[1] >= 12
    assert len({(line.get_color(), line.get_linestyle()) for line in upper.lines[:3]}) == 3
    shown = texts(upper.figure)
    assert "switch to low rank,\nafter step 12" in shown
    assert shown.count("query") == shown.count("attention.output.dense") == shown.count("output.dense") == 2


def test_rank_map_has_a_cell_for_each_projection(tmp_path):
    figure = plot_ranks(PLAN, tmp_path / "deep" / "map.png")
    axes = figure.axes[0]
    assert [t.get_text() for t in axes.texts][:9] == ["8", "9", "10", "11", "dense", "13", "14", "15", "16"]
    assert [t.get_text() for t in axes.get_yticklabels()] == ["0", "1", "2"]
    assert [t.get_text() for t in axes.get_xticklabels()] == ["query", "attention.\noutput.dense", "output.\ndense"]
    assert (tmp_path / "deep" / "map.png").read_bytes().startswith(b"\x89PNG")


def test_spectra_show_the_share_dropped_at_each_rank():
    figure = plot_spectra(SPECTRA, PLAN)
    panels = [axes for axes in figure.axes if axes.get_xlabel() == "" and axes.lines]
    assert [axes.get_title(loc="left") for axes in panels] == ["query", "attention.output.dense", "output.dense"]
    first = panels[0].lines[0]
    total = 5 + 30 * 0.01
    assert list(first.get_ydata()[:3]) == pytest.approx([1, 1.3 / total, 0.3 / total]) and first.get_ydata()[-1] == 0
    dots = [line for line in panels[1].lines if line.get_marker() == "o"]
    assert [list(dot.get_xdata()) for dot in dots] == [[9], [15]]  # the layer between them stays dense
    assert [line.get_xdata()[0] for line in panels[0].lines if line.get_linestyle() == ":"] == [21]  # break-even
    assert len({line.get_color() for line in panels[0].lines[::2][:3]}) == 3


def test_loss_shows_both_runs_and_the_switch():
    figure = plot_loss(LOG, switch_step=8, full_rank=[{"step": s, "loss": 1.0} for s in range(1, 21)])
    axes = figure.axes[0]
    raw, mean, evaluated = axes.lines[:3]
    assert list(raw.get_ydata()) == pytest.approx([2 - s / 20 for s in range(1, 21)])
    assert mean.get_ydata()[5] == pytest.approx(raw.get_ydata()[5])  # a straight line is its own running mean
    assert list(evaluated.get_xdata()) == [10] and list(evaluated.get_ydata()) == [1.6]
    assert "switch to low rank,\nafter step 8" in texts(figure)
    legend = [t.get_text() for t in axes.get_legend().get_texts()]
    assert legend == ["with the switch, running mean", "with the switch, evaluation", "full rank, running mean"]


def test_accuracy_against_size_tells_every_method_apart():
    methods = [f"method {i}" for i in range(10)]
    points = [
        {"method": m, "size": s, "score": 80 + i, "error": 0.5} for i, m in enumerate(methods) for s in (0.5, 0.1)
    ]
    figure = plot_accuracy([*points, {"method": "alone", "size": 1.0, "score": 91.0}], full_rank=93.04)
    axes = figure.axes[0]
    styles = [
        (c.lines[0].get_color(), c.lines[0].get_marker(), c.lines[0].get_markerfacecolor()) for c in axes.containers
    ]
    assert len(set(styles)) == 11 and [color for color, *_ in styles].count(styles[0][0]) == 1
    assert list(axes.containers[0].lines[0].get_xdata()) == [0.1, 0.5]  # sorted by size
    assert "full rank, 93.0" in texts(figure)
    assert [t.get_text() for t in axes.get_xticklabels()] == ["10%", "20%", "30%", "50%", "75%", "100%"]


@pytest.mark.parametrize(
    ("draw", "message"),
    [
        (lambda: plot_stable_ranks([]), "the history is empty"),
        (lambda: plot_ranks({}), "the plan is empty"),
        (lambda: plot_spectra({}), "there are no spectra"),
        (lambda: plot_spectra({"layer.0.fc": [1.0, 2.0]}), r"spectrum of layer\.0\.fc must be falling"),
        (lambda: plot_spectra({"layer.0.fc": [0.0, 0.0]}), "not all zero"),
        (lambda: plot_spectra({"layer.0.fc": [float("nan")]}), "finite"),
        (
            lambda: plot_spectra({"layer.0.fc": [1.0]}, {"layer.0.fc": 2}),
            r"layer\.0\.fc rank 2, but its spectrum has 1",
        ),
        (lambda: plot_loss([{"step": 1, "epoch": 0.1}]), "no loss was logged"),
        (lambda: plot_accuracy([]), "no points with a size above 0"),
        (lambda: plot_accuracy([{"method": "a", "size": 0, "score": 1}]), "no points with a size above 0"),
    ],
)
def test_nothing_to_draw(draw, message):
    with pytest.raises(ValueError, match=message):
        draw()


def test_without_matplotlib_the_extra_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(ImportError, match=r"pip install hf-cuttlefish\[plots\]"):
        plot_ranks(PLAN)


def test_many_layers_stay_legible():
    deep = {f"model.layers.{i}.self_attn.q_proj": 16 + i for i in range(96)}
    axes = plot_ranks(deep).axes[0]
    assert len(axes.get_yticklabels()) <= plan_plots.MOST_ROWS and not axes.texts
    figure = plot_spectra({name: [1.0] * 128 for name in deep}, deep)
    bar = figure.axes[-1]
    assert len(bar.get_yticklabels()) <= 12
