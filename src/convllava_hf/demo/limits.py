"""What one visitor may ask of the page, so that the others and the machine are not harmed."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Limits:
    """Bounds that the page holds.

    `upload_bytes`: of one image's file. `stored_bytes`: what all uploads together take on the disk, and
    `stored_files` how many files and folders they are; they are deleted after `stored_seconds`. `pixels`: of an image
    before it is decoded. `longest_side`: larger images are shrunk to it, since the image processor pads to a square
    before it resizes, and a panorama's square is far larger than it. `questions`: in one conversation. `queue`:
    visitors who wait while one is answered. `answer_tokens`: the largest length that can be asked for, as
    `temperature` is of its kind. `answer_seconds`: an answer ends there.
    """

    upload_bytes: int = 20 * 2**20
    stored_bytes: int = 2**30
    stored_files: int = 20_000
    stored_seconds: int = 3600
    pixels: int = 50_000_000
    longest_side: int = 4096
    question_characters: int = 4000
    questions: int = 30
    queue: int = 16
    answer_tokens: int = 1024
    temperature: float = 2.0
    answer_seconds: float = 300.0
