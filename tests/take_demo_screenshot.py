"""Writes docs/demo.png: the page with a tiny model whose answers are scripted, as its heading says.

python tests/take_demo_screenshot.py [--phone FILE]
"""

import argparse
import json
import time
from pathlib import Path

from helpers.browser import chromium
from helpers.demo_models import scripted_assistant

from convllava_hf.demo.limits import Limits
from convllava_hf.demo.serving import page_of


ASK = "document.querySelector('#question .submit-button') !== null"
IMAGE = Path(__file__).parents[1] / "docs" / "demo.png"


def ask(browser, example: int, question: str | None = None) -> None:
    browser.wait(ASK)
    if question is None:
        browser.click(f"#examples .gallery-item:nth-child({example})")
        browser.wait("document.querySelector('#image img') !== null")
        browser.wait("document.querySelector('#status').innerText.includes('What about it?')")
    else:
        browser.type("#question textarea", question)
    before = browser.evaluate("document.querySelectorAll('#chat [data-testid=bot]').length")
    browser.click("#question .submit-button")
    browser.wait(f"document.querySelectorAll('#chat [data-testid=bot]').length > {json.dumps(before)} && {ASK}")


def take(url: str, path: Path, **size) -> None:
    with chromium() as browser:
        browser.open(url, **size)
        browser.wait("document.querySelector('#image input[type=file]') !== null")
        ask(browser, 4)
        browser.wait("document.querySelector('#chat img')?.naturalWidth > 0")
        browser.evaluate("document.activeElement.blur(); window.scrollTo(0, 0)")
        time.sleep(1)  # the conversation scrolls smoothly
        browser.screenshot(path, whole=size.get("phone", False))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--phone", type=Path, help="also take one on a phone's width")
    args = parser.parse_args()
    with page_of(scripted_assistant(1536), "A tiny model with scripted answers", limits=Limits()) as url:
        take(url, IMAGE, width=1200, height=900)
        if args.phone:
            take(url, args.phone, width=390, height=844, phone=True)


if __name__ == "__main__":
    main()
