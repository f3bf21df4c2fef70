"""The report in a browser."""

import pytest
import torch

from eval.features import load_ruler
from eval.fid import score_images
from eval.models import load_model
from eval.plots import image_grid, loss_curve, step_sizes
from eval.report import write_report
from eval.sample import DrawConfig, draw
from quant.summary import summarise

# The lowest ratio of WCAG 2.2 between a text and what lies behind it; 4.5 is enough for small letters.
CONTRAST = """() => {
  const parts = (color) => color.match(/[\\d.]+/g).map(Number);
  const linear = (c) => (c /= 255) <= 0.04045 ? c / 12.92 : ((c + 0.055) / 1.055) ** 2.4;
  const light = ([r, g, b]) => 0.2126 * linear(r) + 0.7152 * linear(g) + 0.0722 * linear(b);
  const behind = (element) => {
    const color = parts(getComputedStyle(element).backgroundColor);
    return color.length === 3 ? color : behind(element.parentElement);
  };
  const texts = [...document.body.querySelectorAll("*")].filter(
    (element) => [...element.childNodes].some((node) => node.nodeType === 3 && node.textContent.trim())
      && element.tagName !== "SCRIPT");
  return Math.min(...texts.map((element) => {
    const pair = [parts(getComputedStyle(element).color), behind(element)].map(light);
    return (Math.max(...pair) + 0.05) / (Math.min(...pair) + 0.05);
  }));
}"""


@pytest.fixture(scope="module")
def address(made_once, saved, tmp_path_factory):
    """That of the report of a small student."""
    folder = tmp_path_factory.mktemp("report")
    models = [load_model(str(saved / name)) for name in ("teacher", "student")]
    drawing = DrawConfig(num_images=6, num_steps=2)
    drawn = [draw(model, drawing) for model in models]
    timesteps = made_once.student.clock.timesteps
    names, quantizers = zip(*((name, layer.act_quantizer) for name, layer in made_once.student.layers()), strict=True)
    write_report(
        folder / "report.html",
        title="A small student",
        facts=["It was not trained."],
        scores=[
            score_images(model, images, seconds, drawn[0][0], drawing, load_ruler())
            for model, (images, seconds) in zip(models, drawn, strict=True)
        ],
        grid=image_grid([(model.bits, images) for model, (images, _) in zip(models, drawn, strict=True)]),
        loss=loss_curve([1, 2], [2.0, 1.0]),
        step_sizes=step_sizes(names, timesteps, torch.stack([quantizer.scale.detach() for quantizer in quantizers])),
        layers=summarise(made_once.student, models[0].shape),
        config="seed: 0\n",
    )
    return (folder / "report.html").as_uri()


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [390, 1280])
def test_the_report_is_readable(visit, address, is_within_its_width, width, scheme):
    page, wrong = visit(address, width, scheme)
    page.click("summary")
    assert is_within_its_width(page)
    assert page.evaluate(CONTRAST) >= 4.5
    assert (page.evaluate("getComputedStyle(document.body).backgroundColor") == "rgb(255, 255, 255)") == (
        scheme == "light"
    )
    assert page.locator("img").count() == 3
    for picture in page.locator("img").all():
        assert picture.get_attribute("alt")
        assert picture.evaluate("picture => picture.naturalWidth") > 100
    assert not wrong


def test_a_click_on_a_heading_sorts_its_table(visit, address):
    page, wrong = visit(address)
    page.click("summary")
    layers = page.get_by_role("region", name="All layers")
    heading = layers.locator("th", has_text="parameters")

    def column(number):
        return [row.locator("th, td").nth(number).inner_text() for row in layers.locator("tbody tr").all()]

    def parameters():
        return [int(text.replace(",", "")) for text in column(4)]

    before = column(0)
    assert parameters() != sorted(parameters())
    heading.get_by_role("button").click()
    assert parameters() == sorted(parameters())
    assert sorted(column(0)) == sorted(before)
    assert heading.get_attribute("aria-sort") == "ascending"
    page.keyboard.press("Enter")
    assert parameters() == sorted(parameters(), reverse=True)
    assert heading.get_attribute("aria-sort") == "descending"
    layers.get_by_role("button", name="layer").press("Space")
    assert column(0) == sorted(before, key=lambda name: name.replace("_", " "))  # as a browser sorts words
    page.keyboard.press("Space")
    assert column(0) == sorted(before, key=lambda name: name.replace("_", " "), reverse=True)
    assert heading.get_attribute("aria-sort") is None
    assert layers.locator("[aria-sort]").count() == 1
    assert not wrong


def test_what_has_no_score_stays_last(visit, address):
    page, _ = visit(address)
    table = page.get_by_role("region", name="Scores")
    # Of so few images there is no score of the ruler's floor; here one more model without any FID.
    page.evaluate("""() => {
      const body = document.querySelector("table").tBodies[0], row = body.rows[0].cloneNode(true);
      row.cells[3].textContent = "–";
      body.prepend(row);
    }""")
    button = table.get_by_role("button", name="FID ↓", exact=True)
    for _ in range(2):
        button.click()
        texts = [row.locator("td").nth(2).inner_text() for row in table.locator("tbody tr").all()]
        assert texts[-1] == "–"
        assert "–" not in texts[:-1]
