"""Which texts have the form of an id on the Hub."""

import pytest

from convllava_hf.utils.repo_ids import is_repo_id


@pytest.mark.parametrize("name", ["owner/name", "o/n", "Owner-1/name_2.3", "liuhaotian/llava-v1.5-7b"])
def test_ids(name):
    assert is_repo_id(name) and is_repo_id(name, needs_owner=False)


def test_a_name_without_an_owner():
    assert is_repo_id("gpt2", needs_owner=False) and not is_repo_id("gpt2")


@pytest.mark.parametrize(
    "name",
    ["", "./folder", "../a/b", "~/model", "/a/b", "a/b/c", "a/b\n", "a b/c", 'a/b"', "-a/b", "a/b--c", "a/..", "ä/b"]
    + ["a/" + "b" * 97, "https://huggingface.co/a/b", "a\\b"],
)
def test_what_is_not_an_id(name):
    assert not is_repo_id(name) and not is_repo_id(name, needs_owner=False)
