"""Pages that stand alone: nothing from elsewhere, well formed, with the run's numbers in them, in light and dark."""

import itertools
import re
from html.parser import HTMLParser

import pytest

import tiny_trainer
from hf_cuttlefish import CuttlefishCallback, estimate_ranks, factorize
from hf_cuttlefish.report.page import STYLE
from hf_cuttlefish.report.svg import Line, line_chart
from tiny_models import BY_NAME

VOID = {"meta", "br"}
LOG = [{"step": s, "loss": 2 - s / 100} for s in range(1, 101)] + [
    {"step": 50, "eval_loss": 1.6, "eval_accuracy": 0.75, "eval_runtime": 3.25},
    {"step": 100, "eval_loss": 1.1, "eval_accuracy": 0.8125, "eval_runtime": 3.25},
]


class Checker(HTMLParser):
    """Raises where tags are not closed in turn; collects tags and addresses."""

    def __init__(self):
        super().__init__()
        self.open, self.seen, self.addresses = [], set(), []

    def handle_starttag(self, tag, attributes):
        self.seen.add(tag)
        self.addresses += [v for k, v in attributes if k in ("src", "href", "data") or "url(" in (v or "")]
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attributes):
        self.seen.add(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag


@pytest.fixture(scope="module")
def report():
    model = BY_NAME["bert"].build()
    found = factorize(model, estimate_ranks(model))
    found.step = 40
    return found


def test_the_page_tells_the_run_and_stands_alone(report, tmp_path):
    history = [{"step": s, "layer": n, "stable_rank": 5 + s / 100} for s in (0, 10, 20) for n in report.plan]
    text = report.to_html(tmp_path / "deep" / "run.html", history=history, log=LOG, seconds=(0.2, 0.1))
    assert (tmp_path / "deep" / "run.html").read_text() == text
    checker = Checker()
    checker.feed(text)
    assert checker.open == [] and not checker.addresses and "script" not in checker.seen and "svg" in checker.seen
    assert "://" not in text.replace("http://www.w3.org/2000/svg", "")
    for part in (
        "switch, step 40",
        f"{report.parameters_after:,} after",
        "200 ms before",
        "100 ms after (50%)",
        "0.8125",
    ):
        assert part in text, part
    assert "3.25" not in text  # times of an evaluation are no result
    ranks = [int(r) for r in re.findall(r'class="on-\w+"[^>]*>(\d+)<', text)]
    assert sorted(ranks) == sorted(report.plan.values())


def test_what_is_not_known_is_left_out_or_said(report):
    text = report.to_html()
    assert "Loss over the run" not in text and "Too few steps were timed" in text and "from_pretrained" in text


def contrast(one, other):
    def luminance(colour):
        colour = "".join(2 * c for c in colour) if len(colour) == 3 else colour
        parts = [int(colour[i : i + 2], 16) / 255 for i in (0, 2, 4)]
        r, g, b = (p / 12.92 if p <= 0.03928 else ((p + 0.055) / 1.055) ** 2.4 for p in parts)
        return 0.2126 * r + 0.7152 * g + 0.0722 * b

    light, dark = sorted((luminance(one), luminance(other)), reverse=True)
    return (light + 0.05) / (dark + 0.05)


def test_all_colours_can_be_read_in_light_and_in_dark():
    light, dark = (dict(re.findall(r"--([\w-]+):#(\w+)", block)) for block in re.findall(r":root{([^}]*)}", STYLE))
    for colours in (light, dark):
        for name in ("ink", "quiet", *(f"c{i}" for i in range(6))):
            assert contrast(colours[name], colours["paper"]) >= 4.5, name
        assert contrast(colours["on-deep"], colours["cell"]) >= 4.5


def test_lines_are_named_and_differ_in_more_than_colour():
    drawn = line_chart("t", [Line(f"line {i}", [(0, 1), (1, 1)]) for i in range(6)], "x", "y")
    dashes = re.findall(r'<polyline class="line s\d"[^>]*?(stroke-dasharray="[^"]*")?/>', drawn)
    assert len(set(dashes)) == 6
    places = [float(y) for y in re.findall(r'<text class="name s\d" x="[\d.]+" y="([\d.]+)"', drawn)]
    assert len(places) == 6 and all(b - a >= 14.9 for a, b in itertools.pairwise(places))


def test_nothing_to_draw():
    with pytest.raises(ValueError, match="no points"):
        line_chart("t", [Line("a", [])], "x", "y")


def test_a_callback_knows_what_the_page_tells(tmp_path):
    trainer = tiny_trainer.run(tmp_path, max_steps=12, save_strategy="no")[0]
    callback = next(c for c in trainer.callback_handler.callbacks if isinstance(c, CuttlefishCallback))
    text = callback.report.to_html()
    assert f"switch, step {tiny_trainer.SWITCH}" in text and "Change of the stable ranks" in text
    assert "Loss over the run" in text and "AutoModelForSequenceClassification.from_pretrained" in text
