"""The web page as people meet it: in a real browser, on a desktop and on a phone."""

import json
import time

import pytest
from helpers.browser import CHROMIUM, chromium
from helpers.demo_models import BOXES, LONG, PLAIN, scripted_assistant
from helpers.tiny_models import make_image

from convllava_hf.demo.limits import Limits


pytestmark = pytest.mark.slow
pytest.importorskip("gradio")
if CHROMIUM is None:
    pytest.skip("there is no Chromium here", allow_module_level=True)

from convllava_hf.demo.serving import page_of  # noqa: E402


ASK, STOP = "#question .submit-button", "#question .stop-button"
SAID = "[...document.querySelectorAll('#chat [data-testid] span.chatbot')].map(each => each.innerText.trim())"
STATUS = "document.querySelector('#status').innerText"
FILE = "#image input[type=file]"
UPLOAD = 300_000


@pytest.fixture(scope="module")
def assistant():
    return scripted_assistant(seconds_a_token=0.01)


@pytest.fixture(scope="module")
def url(assistant):
    with page_of(assistant, "scripted", limits=Limits(queue=1, upload_bytes=UPLOAD)) as url:
        yield url


@pytest.fixture(scope="module")
def running_browser():
    with chromium() as browser:
        yield browser


@pytest.fixture
def browser(running_browser, url):
    return fresh_page(running_browser, url)


def fresh_page(browser, url, **size):
    browser.open("about:blank")
    browser.requests.clear()
    browser.problems.clear()
    browser.open(url, **size)
    browser.wait("document.querySelector('#image input[type=file]') !== null", seconds=120)  # a busy machine
    browser.wait(f"document.querySelector({json.dumps(ASK)}) !== null")
    return browser


@pytest.fixture
def image(tmp_path):
    make_image(300, 400).save(tmp_path / "image.jpg")
    return tmp_path / "image.jpg"


def show(browser, image) -> None:
    browser.upload(FILE, image)
    browser.wait("document.querySelector('#image img') !== null")
    browser.wait(f"{STATUS}.includes('What about it?')")


def ask(browser, text: str) -> None:
    browser.type("#question textarea", text)
    browser.click(ASK)


def answered(browser, messages: int) -> list[str]:
    """What the conversation says, once it has so many messages and the button asks again."""
    browser.wait(f"{SAID}.length >= {messages} && document.querySelector({json.dumps(ASK)}) !== null")
    return browser.evaluate(SAID)


def test_upload_ask_and_follow_up(browser, image):
    show(browser, image)
    assert "An image of 400 × 300 pixels" in browser.evaluate(STATUS)
    ask(browser, "What is on the sign?")
    assert answered(browser, 2) == ["What is on the sign?", PLAIN]
    assert browser.evaluate("document.querySelector('#question textarea').value") == ""
    browser.type("#question textarea", "And below?")
    browser.press_enter()
    assert answered(browser, 4)[2:] == ["And below?", PLAIN]
    status = browser.evaluate(STATUS)
    for word in ("128 × 128 px", "visual tokens\n4", "first token\n0.", "tokens in"):
        assert word in status


def test_the_answer_streams_and_the_time_to_its_first_token_shows_early(browser, image):
    show(browser, image)
    ask(browser, "Say a long thing")
    lengths = set()
    while browser.evaluate(f"document.querySelector({json.dumps(ASK)}) === null") or len(lengths) < 2:
        said = browser.evaluate(SAID)
        lengths.add(len(said[1]) if len(said) > 1 else 0)
        if len(lengths) == 4:
            assert "first token\n0." in browser.evaluate(STATUS) and "tokens in" not in browser.evaluate(STATUS)
    assert len(lengths) > 10
    assert answered(browser, 2)[1] == LONG.strip()


def test_a_dropped_image_is_taken(browser):
    browser.evaluate(
        """(async () => {
            const canvas = document.createElement("canvas"); canvas.width = 120; canvas.height = 80;
            const blob = await new Promise(done => canvas.toBlob(done, "image/png"));
            const data = new DataTransfer(); data.items.add(new File([blob], "dropped.png", {type: "image/png"}));
            const target = document.querySelector("#image input[type=file]").closest("button, .wrap, div");
            target.dispatchEvent(new DragEvent("drop", {dataTransfer: data, bubbles: true, cancelable: true}));
        })()"""
    )
    browser.wait(f"{STATUS}.includes('An image of 120 × 80 pixels')")


def test_boxes_are_drawn_on_the_image(browser, image):
    show(browser, image)
    ask(browser, "Where? Give a box.")
    assert answered(browser, 2)[1] == BOXES
    size = browser.wait(
        "(() => { const drawn = document.querySelector('#chat img');"
        "return drawn && drawn.naturalWidth ? [drawn.naturalWidth, drawn.naturalHeight] : null })()"
    )
    assert size == [400, 300]
    red = browser.evaluate(
        "(() => { const drawn = document.querySelector('#chat img'), canvas = document.createElement('canvas');"
        "canvas.width = 400; canvas.height = 300; const pen = canvas.getContext('2d'); pen.drawImage(drawn, 0, 0);"
        "return [...pen.getImageData(165, 200, 1, 1).data] })()"
    )
    assert red[0] > 180 and red[1] < 90  # the left edge of the mug's box, where the padding above is undone
    assert "boxes\n2" in browser.evaluate(STATUS)


def test_an_example_fills_image_and_question(browser):
    browser.click("#examples .gallery-item:nth-child(4)")
    browser.wait("document.querySelector('#question textarea').value.startsWith('Where is the blue mug?')")
    browser.wait(f"{STATUS}.includes('1200 × 750')")
    browser.click(ASK)
    assert answered(browser, 2)[1] == BOXES


def test_another_resolution_is_what_the_model_sees(browser, image):
    show(browser, image)
    browser.click("#resolution label:nth-of-type(2)")
    browser.wait("document.querySelector('#resolution label:nth-of-type(2) input').checked")
    ask(browser, "What?")
    answered(browser, 2)
    assert "64 × 64 px" in browser.evaluate(STATUS) and "visual tokens\n1\n" in browser.evaluate(STATUS)


def test_stop_really_stops(browser, image, assistant):
    show(browser, image)
    ask(browser, "Say a long thing")
    browser.wait(f"{SAID}.length > 1 && {SAID}[1].length > 10")
    browser.click(STOP)
    said = answered(browser, 2)
    assert LONG.startswith(said[1]) and len(said[1]) < len(LONG) - 50
    assert "stopped" in browser.evaluate(STATUS)
    assert assistant.model.generating == 0 and assistant.model.generated < 500
    ask(browser, "What else?")
    assert answered(browser, 4)[2:] == ["What else?", PLAIN]


def test_closing_the_page_ends_the_generation(browser, image, assistant):
    show(browser, image)
    ask(browser, "Say a long thing")
    browser.wait(f"{SAID}.length > 1 && {SAID}[1].length > 10")
    browser.open("about:blank")
    deadline = time.monotonic() + 10
    while assistant.model.generating:
        assert time.monotonic() < deadline
        time.sleep(0.05)
    assert assistant.model.generated < 700


def test_a_text_file_named_jpg_is_refused_and_the_next_image_works(browser, image, tmp_path):
    (tmp_path / "text.jpg").write_text("no image at all")
    browser.upload(FILE, tmp_path / "text.jpg")
    browser.wait(f"{STATUS}.includes('not an image that can be read')")
    assert browser.evaluate("document.querySelector('#status [role=alert]') !== null")
    browser.wait("document.querySelector('#image img') === null")
    show(browser, image)
    ask(browser, "What?")
    assert answered(browser, 2) == ["What?", PLAIN]


def test_a_file_that_is_too_large_is_refused_and_the_next_image_works(browser, image, tmp_path):
    (tmp_path / "large.jpg").write_bytes(image.read_bytes() + b"x" * UPLOAD)
    browser.upload(FILE, tmp_path / "large.jpg")
    browser.wait("/exceeds|too large|maximum/i.test(document.body.innerText)")
    show(fresh_page(browser, browser.evaluate("location.href")), image)


def test_a_question_without_an_image_is_told_and_kept(browser):
    ask(browser, "What?")
    browser.wait(f"{STATUS}.includes('no image yet')")
    browser.wait(f"document.querySelector({json.dumps(ASK)}) !== null")
    assert browser.evaluate("document.querySelector('#question textarea').value") == "What?"
    assert browser.evaluate("document.querySelector('#status [role=alert]') !== null")
    assert browser.evaluate(SAID) == []


def test_a_fault_is_shown_to_the_person(browser, image):
    show(browser, image)
    ask(browser, "break")
    browser.wait(f"{STATUS}.includes('Something went wrong on the server')")
    assert "secret" not in browser.evaluate("document.body.innerText")
    browser.wait(f"document.querySelector({json.dumps(ASK)}) !== null")


def test_what_people_and_models_write_is_text(browser, image):
    show(browser, image)
    typed = "<img src=x onerror='window.hacked=1'> **bold** ![a](https://example.com/a.png) <image> $x$"
    ask(browser, typed)
    assert answered(browser, 2)[0] == typed
    assert browser.evaluate("window.hacked === undefined && document.querySelector('#chat img') === null")


def test_a_new_conversation_forgets_the_old_one(browser, image, assistant, tmp_path):
    show(browser, image)
    ask(browser, "First?")
    answered(browser, 2)
    browser.click("#restart")
    browser.wait(f"{SAID}.length === 0")
    ask(browser, "Second?")
    assert answered(browser, 2)[0] == "Second?"
    assert "First?" not in assistant.model.prompts[-1]
    browser.click("#chat button[aria-label=Clear]")
    browser.wait(f"{SAID}.length === 0")
    ask(browser, "Third?")
    answered(browser, 2)
    assert "Second?" not in assistant.model.prompts[-1]
    make_image(90, 200, seed=3).save(tmp_path / "other.png")
    browser.click("#image button[aria-label*=Clear], #image button[aria-label*=Remove]")
    show(browser, tmp_path / "other.png")
    browser.wait(f"{SAID}.length === 0")


def test_a_full_queue_is_told_and_the_question_can_be_asked_again(browser, image, url, assistant):
    """One is answered and one waits; the third is told."""
    gradio_client = pytest.importorskip("gradio_client")
    clients = [gradio_client.Client(url, verbose=False) for _ in range(2)]
    show(browser, image)
    preset = browser.evaluate("document.querySelector('#resolution label').innerText.trim()")
    arguments = [gradio_client.handle_file(str(image)), "Say a long thing", preset, 1024, 0.0]
    jobs = [client.submit(*arguments, api_name="/ask") for client in clients]
    deadline = time.monotonic() + 20
    while not any(len(job.outputs()) > 1 for job in jobs):
        assert time.monotonic() < deadline
        time.sleep(0.05)
    time.sleep(0.5)
    ask(browser, "What?")
    browser.wait(f"{STATUS}.includes('too many people are waiting')")
    browser.wait(f"document.querySelector({json.dumps(ASK)}) !== null")
    for job in reversed(jobs):
        job.cancel()
    deadline = time.monotonic() + 20
    while assistant.model.generating:
        assert time.monotonic() < deadline
        time.sleep(0.05)
    browser.click(ASK)
    assert answered(browser, 2) == ["What?", PLAIN]


def test_the_page_fits_a_phone(running_browser, url, image):
    browser = fresh_page(running_browser, url, width=360, height=740, phone=True)
    show(browser, image)
    ask(browser, "Where? Give a box.")
    answered(browser, 2)
    browser.wait("document.querySelector('#chat img') !== null")
    assert browser.evaluate("document.documentElement.scrollWidth") <= 360
    for selector in ("#image", "#chat", "#question", ASK, "#examples", "#resolution", "#restart", "#chat img"):
        left, right = browser.evaluate(
            f"(() => {{ const box = document.querySelector({json.dumps(selector)}).getBoundingClientRect();"
            "return [box.left, box.right] })()"
        )
        assert 0 <= left < right <= 360, selector
    font = browser.evaluate("parseFloat(getComputedStyle(document.querySelector('#question textarea')).fontSize)")
    assert font >= 16  # else iOS zooms in and the page no longer fits


def test_nothing_is_asked_of_other_machines(browser, image, url):
    show(browser, image)
    ask(browser, "Where? Give a box.")
    answered(browser, 2)
    browser.wait("document.querySelector('#chat img') !== null")
    assert len(browser.requests) > 10
    assert [address for address in browser.requests if not address.startswith((url, "data:", "blob:"))] == []
    assert browser.problems == []
