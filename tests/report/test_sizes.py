"""Sizes: what each saves and costs, where the knee is, and what the table, the picture and the page say of it."""

import pytest
import torch

from hf_cuttlefish import CuttlefishConfig, factorize
from hf_cuttlefish.decide.targets import find_targets
from hf_cuttlefish.measure.cuts import Measured
from hf_cuttlefish.measure.gathering import gather_statistics
from hf_cuttlefish.report.plotting import plot_sizes
from hf_cuttlefish.report.sizes import SizeCurve, SizePoint, size_curve
from hf_cuttlefish.report.story import sizes_page
from tiny_models import BY_NAME

CONFIG = CuttlefishConfig(rank_multiple=1)


@pytest.fixture(scope="module")
def measured():
    """A curve of a tiny model, and the model."""
    model = BY_NAME["bert"].build().eval()
    torch.manual_seed(0)
    batches = [BY_NAME["bert"].inputs() for _ in range(4)]
    statistics = gather_statistics(model, batches[:2], find_targets(model))
    return model, size_curve(model, [0.3, 0.6, 0.5, 0.3], CONFIG, statistics=statistics, held_out=batches[2:])


def test_sizes_are_those_of_the_factorized_model(measured, tmp_path):
    model, curve = measured
    assert [round(p.kept, 1) for p in curve.points] == [0.6, 0.5, 0.3]  # from large to small, each once
    assert curve.dense.kept == 1 and curve.dense.parameters == sum(p.numel() for p in model.parameters())
    small = BY_NAME["bert"].build()
    factorize(small, curve.plans[-1])
    last = curve.points[-1]
    assert last.parameters == sum(p.numel() for p in small.parameters())
    assert last.flops == 2 * last.target_parameters
    small.save_pretrained(tmp_path)
    written = (tmp_path / "model.safetensors").stat().st_size
    assert abs(written - last.file_bytes) < 20_000  # the file has a header with names
    assert last.predicted_loss_increase > curve.points[0].predicted_loss_increase > 0
    assert last.measured.divergence > curve.points[0].measured.divergence


def curve_of(losses, divergences=None):
    """A curve with these measured losses: the dense model's first, then of the sizes 0.5, 0.4, 0.3, 0.2."""
    kept = [1.0, 0.5, 0.4, 0.3, 0.2][: len(losses)]
    divergences = divergences or [0.0] * len(losses)
    points = [
        SizePoint(k, int(1e6 * k), int(1e6 * k), 1, 1, 0.0, Measured(loss, 0.9, None, d, 0.9))
        for k, loss, d in zip(kept, losses, divergences, strict=True)
    ]
    return SizeCurve(points[0], points[1:], [])


def test_the_knee_is_where_the_loss_begins_to_rise():
    assert curve_of([1.0, 1.0, 1.01, 1.5, 3.0]).knee().kept == 0.4
    assert curve_of([1.0, 1.0, 1.0, 1.0, 2.0]).knee().kept == 0.3
    assert curve_of([1.0, 0.9, 0.9, 0.9, 0.9]).knee() is None  # nothing was lost
    assert curve_of([1.0, 1.1, 1.2]).knee() is None  # too few sizes to see a bend


def test_the_bound_is_that_of_the_default_size():
    assert curve_of([1.0] * 5, [0, 0.001, 0.009, 0.011, 0.05]).within_bound().kept == 0.4
    assert curve_of([1.0] * 5, [0, 0.02, 0.03, 0.04, 0.05]).within_bound() is None


def test_table_picture_and_page_say_the_same(measured, tmp_path):
    _, curve = measured
    table = curve.table().splitlines()
    assert len(table) >= 6 and table[2].startswith("dense") and "accuracy, %" in table[0]
    assert f"{curve.points[-1].measured.loss:.4g}" in table[5]
    figure = plot_sizes(curve, tmp_path / "sizes.png")
    drawn = figure.axes[0].lines[0]
    assert sorted(drawn.get_ydata()) == sorted(p.measured.loss for p in curve.points)
    page = sizes_page(curve, tmp_path / "sizes.html", name="<tiny>")
    assert (tmp_path / "sizes.html").read_text() == page and "&lt;tiny&gt;" in page
    assert f"{curve.points[-1].measured.loss:.4g}" in page


def test_without_data_sizes_alone(measured):
    model, _ = measured
    curve = size_curve(model, [0.5, 0.25], CONFIG)
    assert curve.dense.measured is None and curve.knee() is None and "nothing was measured" in curve.table()
    with pytest.raises(ValueError, match="nothing was measured"):
        plot_sizes(curve)


@pytest.mark.parametrize("ratios", [[], [1.0], [0.0, 0.5]])
def test_bad_ratios(measured, ratios):
    with pytest.raises(ValueError, match="above 0 and below 1"):
        size_curve(measured[0], ratios, CONFIG)
