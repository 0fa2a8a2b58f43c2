"""One commit or nothing: the real client of the Hub against a double of it on loopback."""

import hashlib

import pytest
from helpers.publishing import own_hub

from convllava_hf.errors import ConvLlavaError
from convllava_hf.publish.hub_upload import Publisher, Target, check_target, find_token
from convllava_hf.publish.staging import LOADED


REPO = "user/model"
FILES = {
    "README.md": b"---\nlicense: mit\n---\n",
    "config.json": b"{}",
    "model-00001-of-00002.safetensors": b"first" * 1000,
    "model-00002-of-00002.safetensors": b"second" * 1000,
    "model.safetensors.index.json": b"{}",
}


@pytest.fixture
def hub(monkeypatch):
    with own_hub(monkeypatch) as hub:
        yield hub


def publish(files=FILES, repo=REPO, force=False, token="hf_writer", **target):
    return Publisher(token).publish(Target(repo, **target), files, message="Publish it", managed=LOADED, force=force)


def sha256(name: str) -> str:
    return hashlib.sha256(FILES[name]).hexdigest()


def fail_once(hub, method: str, ending: str, fault):
    """The first request of this kind meets the fault."""
    met = []

    def choose(request_method: str, path: str):
        if request_method == method and path.endswith(ending) and not met:
            met.append(path)
            return fault() if callable(fault) else fault
        return None

    hub.fault = choose
    return met


def test_everything_becomes_visible_in_one_commit(hub):
    committed = publish()
    assert hub.files(REPO) == FILES
    assert hub.titles(REPO) == ["Publish it (convllava push)", "initial commit"]
    assert committed.url.endswith(hub.branches[REPO]["main"])


def test_files_on_disk_are_published_as_they_are(hub, tmp_path):
    path = tmp_path / "weights"
    path.write_bytes(b"w" * (3 << 20))
    publish({"model.safetensors": path, "config.json": b"{}"})
    assert hub.files(REPO)["model.safetensors"] == path.read_bytes()
    assert publish({"model.safetensors": path, "config.json": b"{}"}).url is None
    path.write_bytes(b"v" * (3 << 20))
    assert publish({"model.safetensors": path, "config.json": b"{}"}).plan.added == ["model.safetensors"]


def test_a_second_push_of_the_same_changes_nothing(hub):
    publish()
    committed = publish()
    assert committed.url is None
    assert len(hub.titles(REPO)) == 2 and len(hub.uploads) == 2


def test_a_second_push_replaces_what_has_changed_and_removes_what_would_be_loaded_instead(hub):
    publish()
    hub.commit(REPO, "main", {"banner.png": b"theirs"}, [], title="Add a banner")
    one = {"README.md": FILES["README.md"], "config.json": b"{1}", "model.safetensors": b"one"}
    committed = publish(one)
    assert hub.files(REPO) == {**one, "banner.png": b"theirs"}
    assert committed.plan.added == ["config.json", "model.safetensors"]
    assert committed.plan.unchanged == ["README.md"]
    assert committed.plan.removed == [name for name in FILES if name.startswith("model")]
    publish()
    assert hub.files(REPO) == {**FILES, "banner.png": b"theirs"}


@pytest.mark.parametrize(
    ("change", "delete", "named"),
    [
        ({"README.md": b"Mine.", "config.json": b"{2}"}, [], ["README.md", "config.json"]),
        ({}, ["config.json"], ["config.json (deleted there)"]),
        ({"model.safetensors": b"theirs"}, [], ["model.safetensors (to be removed)"]),
        ({".gitignore": b"*.safetensors"}, [], [".gitignore"]),
    ],
)
def test_what_others_changed_is_named_and_left_alone_without_force(hub, change, delete, named):
    publish()
    hub.commit(REPO, "main", change, delete, title="Update by hand")
    before = hub.branches[REPO]["main"]
    ours = {**FILES, "README.md": b"New.", "config.json": b"{3}"}
    with pytest.raises(ConvLlavaError, match="--force") as error:
        publish(ours)
    assert all(name in str(error.value) for name in named)
    assert hub.branches[REPO]["main"] == before
    publish(ours, force=True)
    assert {name: hub.files(REPO)[name] for name in ours} == ours
    assert "model.safetensors" not in hub.files(REPO)


def test_what_others_changed_to_what_we_push_is_no_conflict(hub):
    publish()
    hub.commit(REPO, "main", {"config.json": b"{3}"}, [], title="Update by hand")
    assert publish({**FILES, "config.json": b"{3}"}).url is None


def test_a_change_is_still_known_after_further_commits_of_others(hub):
    publish()
    hub.commit(REPO, "main", {"README.md": b"Mine."}, [], title="Update README.md")
    hub.commit(REPO, "main", {"banner.png": b"x"}, [], title="Add a banner")
    with pytest.raises(ConvLlavaError, match="README.md"):
        publish({**FILES, "README.md": b"New."})


def test_a_repository_that_another_tool_filled_is_not_overwritten(hub):
    hub.create(REPO)
    hub.commit(REPO, "main", {"model.safetensors": b"theirs", "config.json": b"theirs"}, [], title="Upload model")
    with pytest.raises(ConvLlavaError) as error:
        publish()
    assert "config.json" in str(error.value) and "model.safetensors (to be removed)" in str(error.value)
    assert len(hub.titles(REPO)) == 2


def test_somebody_who_commits_in_between_is_not_overwritten(hub):
    publish()

    def commit():
        hub.commit(REPO, "main", {"README.md": b"Mine."}, [], title="Update README.md")

    met = fail_once(hub, "POST", "/commit/main", commit)
    with pytest.raises(ConvLlavaError, match="somebody else just committed"):
        publish({**FILES, "config.json": b"{3}"})
    assert met and hub.files(REPO) == {**FILES, "README.md": b"Mine."}


@pytest.mark.parametrize("fault", [500, 403, "drop"])
def test_a_commit_that_fails_leaves_nothing_and_can_be_repeated(hub, fault):
    met = fail_once(hub, "POST", "/commit/main", fault)
    with pytest.raises(ConvLlavaError, match="Nothing was published"):
        publish()
    assert met and hub.files(REPO) == {} and sorted(hub.uploads) == sorted(map(sha256, list(FILES)[2:4]))
    publish()
    assert hub.files(REPO) == FILES
    assert len(hub.uploads) == 2  # what had arrived was not sent again


def test_a_large_file_that_does_not_arrive_leaves_nothing_and_the_others_are_not_sent_again(hub):
    second = sha256("model-00002-of-00002.safetensors")
    met = fail_once(hub, "PUT", second, 400)
    with pytest.raises(ConvLlavaError, match="Nothing was published") as error:
        publish()
    assert "model-00002-of-00002.safetensors" in str(error.value)
    assert met and hub.files(REPO) == {} and second not in hub.uploads
    publish()
    assert hub.files(REPO) == FILES
    assert sorted(hub.uploads) == sorted(map(sha256, list(FILES)[2:4]))


def test_a_failing_update_leaves_the_last_version(hub):
    publish()
    met = fail_once(hub, "POST", "/commit/main", 500)
    with pytest.raises(ConvLlavaError, match="is as it was"):
        publish({"config.json": b"{4}", "model.safetensors": b"new"})
    assert met and hub.files(REPO) == FILES


def test_a_commit_whose_answer_was_lost_is_found(hub):
    met = fail_once(hub, "POST", "/commit/main", "lose")
    committed = publish()
    assert met and committed.url.endswith(hub.branches[REPO]["main"])
    assert len(hub.titles(REPO)) == 2


def test_a_hub_that_does_not_answer_any_more_is_told_apart(hub):
    gone = []

    def choose(method, path):
        if path.endswith("/commit/main"):
            gone.append(path)
        return 403 if gone else None

    hub.fault = choose
    with pytest.raises(ConvLlavaError, match="not known whether the commit arrived"):
        publish()


def test_a_branch_is_made_with_the_commit(hub):
    publish()
    other = {**FILES, "config.json": b"{5}"}
    publish(other, revision="v2")
    assert hub.files(REPO, "v2") == other and hub.files(REPO) == FILES
    publish(revision="same")
    assert hub.files(REPO, "same") == FILES


def test_a_branch_whose_commit_fails_is_taken_away(hub):
    publish()
    met = fail_once(hub, "POST", "/commit/v2", 500)
    with pytest.raises(ConvLlavaError, match="Nothing was published"):
        publish({**FILES, "config.json": b"{5}"}, revision="v2")
    assert met and list(hub.branches[REPO]) == ["main"]


def test_a_pull_request_changes_nothing_but_itself(hub):
    publish()
    committed = publish({**FILES, "config.json": b"{6}"}, create_pr=True)
    assert committed.url.endswith("/discussions/1")
    assert hub.files(REPO) == FILES
    assert hub.files(REPO, "refs/pr/1")["config.json"] == b"{6}"


def test_a_private_repository(hub):
    target = Target(REPO, private=True)
    Publisher("hf_writer").check_access(target)
    publish(private=True)
    assert REPO in hub.private
    Publisher("hf_writer").check_access(target)
    publish(repo="user/public")
    with pytest.raises(ConvLlavaError, match="is public"):
        Publisher("hf_writer").check_access(Target("user/public", private=True))


def test_a_space_is_another_repository(hub):
    publish()
    publish({"app.py": b"print()"}, kind="space")
    assert hub.files(f"spaces/{REPO}") == {"app.py": b"print()"}
    assert hub.files(REPO) == FILES


@pytest.mark.parametrize(("token", "message"), [("hf_invalid", "does not accept"), ("hf_reader", "can only read")])
def test_a_token_that_will_not_do_is_refused_first(hub, token, message):
    with pytest.raises(ConvLlavaError, match=message) as error:
        Publisher(token).check_access(Target(REPO))
    assert token not in str(error.value) and REPO not in hub.commits


def test_where_tokens_come_from(monkeypatch, tmp_path):
    from huggingface_hub import constants

    saved = tmp_path / "token"
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(saved))
    monkeypatch.setenv("HF_TOKEN", "hf_environment")
    saved.write_text("hf_login\n")
    assert find_token() == find_token("environment") == "hf_environment"
    assert find_token("login") == "hf_login"
    monkeypatch.delenv("HF_TOKEN")
    monkeypatch.delenv("HUGGING_FACE_HUB_TOKEN", raising=False)
    assert find_token() == "hf_login"
    with pytest.raises(ConvLlavaError, match="HF_TOKEN is not set"):
        find_token("environment")
    saved.unlink()
    assert find_token(required=False) is None
    for source in (None, "login"):
        with pytest.raises(ConvLlavaError, match="hf auth login"):
            find_token(source)
    with pytest.raises(ConvLlavaError, match="environment or the login only") as error:
        find_token("hf_typed")
    assert "hf_typed" not in str(error.value)


@pytest.mark.parametrize(
    "target",
    [
        Target("model"),
        Target("a/b/c"),
        Target("user/"),
        Target("user/two words"),
        Target(REPO, revision="v2", create_pr=True),
        Target(REPO, revision="0123456789abcdef0123456789abcdef01234567"),
    ],
)
def test_targets_that_the_hub_would_refuse(target):
    with pytest.raises(ConvLlavaError):
        check_target(target)
