import re
import shutil
import socket
import sys
import urllib.request

import pytest
import torch

from ddpm_mnist.lab import InputError
from ddpm_mnist.sampling.noise import draw_noise, image_generators
from ddpm_mnist.sampling.sampler import to_uint8
from eval.demo import DemoConfig, Player, film, launch, make_page, rows, serve
from eval.metrics import measure
from eval.models import load_model
from eval.sample import DrawConfig, draw


@pytest.fixture
def folders(teacher_folder, student_folder):
    """A teacher's and a student's."""
    return teacher_folder, student_folder


def make_config(folders, **values):
    teacher, *students = folders
    return DemoConfig(**{"students": students, "teacher": teacher, "columns": 4, "num_steps": 3, "port": 0, **values})


def test_a_film_begins_with_the_noise_and_ends_with_the_images(folders):
    drawing, model = make_config(folders).drawing(7), load_model(folders[1], "integer")
    made = film(model, drawing)
    assert made.states.shape == (4, 4, 28, 28)
    assert torch.equal(made.states[0], to_uint8(draw_noise(image_generators(range(7, 11)), (1, 28, 28))))
    assert torch.equal(made.images, draw(model, drawing)[0])
    assert made.milliseconds > 0


def test_the_share_of_same_digits_is_the_one_of_the_scores():
    config = DemoConfig(students=["w2a4"], num_steps=5, columns=16)
    films = [film(load_model(name, "integer"), config.drawing(0)) for name in ("teacher", "w2a4")]
    share = measure(films[1].images, films[0].images)["same_digit"]
    html = rows(films)
    assert html.count("same digit") == 1
    assert f"same digit {share:.0%}" in html
    assert html.count("<i ") == round(16 * (1 - share)) > 0, "a frame around each of the others"


@pytest.mark.parametrize("seed", ["", "five", "1.5", "-1", "2147483645", "99999999999999999999", "1e3"])
def test_a_seed_that_is_none_is_named(seed):
    with pytest.raises(InputError, match=f"a whole number from 0 to 2147483644, not “{re.escape(seed)}”"):
        Player(DemoConfig(columns=4)).draw(["w4a4"], seed)


def test_a_player_says_what_cannot_be_drawn(folders, own_student):
    player = Player(make_config(folders))
    with pytest.raises(InputError, match="at least one student"):
        player.draw([], "0")
    assert player.draw([folders[1]], " 2147483644 ").count("<figure>") == 2
    other = Player(make_config((folders[0], str(own_student))))
    shutil.rmtree(own_student)
    with pytest.raises(InputError, match="neither released"):
        other.draw([str(own_student)], "0")


def test_a_random_seed_is_one_that_can_be_drawn(folders):
    player = Player(make_config(folders))
    seeds = {player.random_seed() for _ in range(20)}
    assert len(seeds) > 1
    assert all(0 <= int(seed) <= 2147483644 for seed in seeds)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--students", "nothing"], 'no model "nothing": neither released'),
        (["--columns", "0"], "columns must lie in 1…50, not 0"),
        (["--port", "65536"], "port must lie in 0…65535, not 65536"),
        (["--seed", "2147483640"], "seed must lie in"),
        (["--runtime", "fast"], "runtime must be"),
        ([], "the page needs gradio: pip install 'efficientdm[demo]'"),
    ],
)
def test_wrong_input_gets_one_line_and_exit_code_2(arguments, message, monkeypatch, refuse):
    monkeypatch.setattr("eval.demo.make_page", lambda config: None) if arguments else monkeypatch.setitem(
        sys.modules, "gradio", None
    )
    assert message in refuse(serve, DemoConfig, arguments)


def test_a_port_that_is_taken_is_named():
    with socket.create_server(("127.0.0.1", 0)) as server:
        config = DemoConfig(port=server.getsockname()[1])
        with pytest.raises(InputError, match=f"127.0.0.1, port {config.port}: Address already in use"):
            launch(None, config)
    with pytest.raises(InputError, match=r"cannot be served at 192\.0\.2\.1"):
        launch(None, DemoConfig(host="192.0.2.1"))


@pytest.fixture
def served(folders, tmp_path, monkeypatch):
    """The address of a page with a student, and with a folder that is no model; the names that its server asks for."""
    names, look_up = set(), socket.getaddrinfo
    monkeypatch.setattr(
        socket, "getaddrinfo", lambda name, *rest, **more: (names.add(name), look_up(name, *rest, **more))[1]
    )
    (tmp_path / "empty").mkdir()
    config = make_config((*folders, str(tmp_path / "empty")))
    page = make_page(config)
    yield launch(page, config), names
    page.close(verbose=False)


def test_the_page_in_a_browser(served, visit, is_within_its_width):
    address, names = served
    page, wrong = visit(address)
    films, alert = page.locator(".film img"), page.get_by_role("alert")

    def wait_for_other(picture):
        page.wait_for_function("before => document.querySelector('.film img')?.src !== before", arg=picture)
        return films.first.get_attribute("src")

    alert.wait_for()
    assert "empty" in alert.inner_text()
    assert "neither released" in alert.inner_text()
    assert films.count() == 0

    page.get_by_label("empty").uncheck()
    page.get_by_role("button", name="Draw").click()
    first = wait_for_other(None)
    assert films.count() == 2
    assert "teacher" in films.first.get_attribute("alt")
    assert alert.count() == 0
    assert len(re.findall(r"\d ms per image", page.inner_text("section"))) == 2
    assert page.inner_text("section").count("same digit") == 1

    page.get_by_label("Seed").fill("5")
    page.get_by_label("Seed").press("Enter")
    second = wait_for_other(first)
    page.get_by_role("button", name="New noise").click()
    third = wait_for_other(second)
    assert page.get_by_label("Seed").input_value() != "5"

    slider = page.get_by_label("Denoising step")
    assert page.inner_text("output") == "Step 3 of 3"
    last = films.first.bounding_box()
    slider.press("ArrowLeft")
    assert page.inner_text("output") == "Step 2 of 3"
    frame = page.locator(".film").first.bounding_box()
    moved = films.first.bounding_box()["y"] - last["y"]
    assert moved == pytest.approx(frame["height"], abs=1), "one image further up"
    page.get_by_role("button", name="Play").click()
    page.wait_for_function("document.querySelector('output').textContent === 'Step 3 of 3'")
    page.get_by_role("button", name="Play").wait_for()

    page.get_by_label("Seed").fill("<b>five</b>")
    page.get_by_role("button", name="Draw").click()
    alert.wait_for()
    assert alert.inner_text() == "The seed must be a whole number from 0 to 2147483644, not “<b>five</b>”."
    page.get_by_label("student").uncheck()
    page.get_by_role("button", name="New noise").click()
    alert.get_by_text("Choose at least one student.").wait_for()
    assert films.first.get_attribute("src") == third, "what was drawn stays"

    page.set_viewport_size({"width": 390, "height": 844})
    assert is_within_its_width(page)
    assert not wrong
    assert names <= {"127.0.0.1"}, "no other host is asked for"


def test_the_page_names_no_script_font_or_picture_elsewhere(served):
    address, _ = served
    for name in ("", "theme.css"):
        text = urllib.request.urlopen(address + name).read().decode()
        assert not re.findall(r"""(?:src|href)=["']?(?:https?:)?//[^"'> ]+|url\(["']?(?:https?:)?//[^)]+""", text)


def test_a_film_is_the_same_under_autocast():
    model, drawing = load_model("teacher"), DrawConfig(num_steps=2, num_images=1)
    usual = film(model, drawing)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(film(model, drawing).states, usual.states)
