import shutil

import pytest
from playwright.sync_api import sync_playwright

from ddpm_mnist.unet import save_teacher
from quant import freeze


@pytest.fixture(scope="session")
def saved(made_once, tmp_path_factory):
    """A folder with a teacher and a student, which no test changes."""
    folder = tmp_path_factory.mktemp("models")
    save_teacher(made_once.unet, folder / "teacher")
    freeze(made_once.student).save_pretrained(folder / "student")
    shutil.copytree(folder / "teacher" / "scheduler", folder / "student" / "scheduler")
    return folder


@pytest.fixture
def teacher_folder(saved):
    return str(saved / "teacher")


@pytest.fixture
def student_folder(saved):
    return str(saved / "student")


@pytest.fixture
def own_student(saved, tmp_path):
    """The folder of a student that a test may change."""
    return shutil.copytree(saved / "student", tmp_path / "student")


@pytest.fixture(scope="module")
def browser():
    """Headless Chromium; where it is missing, what asks for it is skipped."""
    chromium = shutil.which("chromium")
    if chromium is None:
        pytest.skip("this machine has no chromium")
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture
def visit(browser):
    """A function that opens an address: the page, and a list that takes its errors and its requests to elsewhere."""
    contexts = []

    def open_page(address, width=1280, scheme="light"):
        contexts.append(browser.new_context(viewport={"width": width, "height": 900}, color_scheme=scheme))
        contexts[-1].set_default_timeout(300_000)  # milliseconds, for a busy machine
        page, wrong = contexts[-1].new_page(), []
        page.on("console", lambda message: wrong.append(message.text) if message.type == "error" else None)
        page.on("pageerror", lambda error: wrong.append(str(error)))
        page.on(
            "request",
            lambda request: None if request.url.startswith((address, "data:")) else wrong.append(request.url),
        )
        page.goto(address)
        return page, wrong

    yield open_page
    for context in contexts:
        context.close()


@pytest.fixture
def is_within_its_width():
    """Whether nothing of a page sticks out sideways."""
    return lambda page: page.evaluate("document.documentElement.scrollWidth <= window.innerWidth")
