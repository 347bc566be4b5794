from __future__ import annotations

import errno
import json
import os
from dataclasses import replace
from pathlib import Path

import pytest
import xxhash
from hypothesis import given
from hypothesis import strategies as st

from slipstream.errors import ArtifactError, CapacityError
from slipstream.io.artifacts import (
    StageKey,
    add_output,
    attempt,
    find_artifact,
    hash_file,
    leftovers,
    open_artifact,
    publish,
    remove_artifact,
    scratch_dir,
    wrap_write_errors,
    write_atomically,
    write_json,
)

KEY = StageKey(stage="profile", config={"sample_ratio": 1.0, "curve": [0.1]}, inputs={"preprocess": "ab" * 8}, seed=3)


def publish_files(run_dir: Path, key: StageKey = KEY, **files: str):
    scratch = scratch_dir(run_dir, key)
    for name, text in files.items():
        path = scratch / name.replace("__", "/")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return publish(run_dir, key, {"rows": 7}, seconds=1.23456, peak_bytes=10)


def test_a_published_artifact_lists_its_files_and_opens_again(tmp_path: Path):
    artifact = publish_files(tmp_path, train__a="one", train__b="two", val__a="three", work__junk="x")
    assert artifact.path == tmp_path / "profile" / KEY.fingerprint
    assert not (artifact.path / "work").exists()
    found = find_artifact(tmp_path, KEY)
    assert found == artifact == open_artifact(artifact.path)
    assert [path.name for path in artifact.files("train/")] == ["a", "b"]
    assert artifact.manifest["outputs"]["train/a"] == {"bytes": 3, "xxh3": xxhash.xxh3_64_hexdigest(b"one")}
    assert artifact.manifest["config"] == dict(KEY.config)
    assert (artifact.counts, artifact.fingerprint) == ({"rows": 7}, KEY.fingerprint)


def test_the_fingerprint_of_a_key_never_changes_by_itself():
    # Renew this only together with FORMAT_VERSION: every published artifact would run again.
    assert KEY.fingerprint == "0905e445f1346776"


def test_the_fingerprint_ignores_the_order_of_keys():
    shuffled = replace(KEY, config=dict(reversed(KEY.config.items())))
    assert shuffled.fingerprint == KEY.fingerprint


@pytest.mark.parametrize(
    "other",
    [
        replace(KEY, stage="segregate"),
        replace(KEY, config={"sample_ratio": 0.5, "curve": [0.1]}),
        replace(KEY, inputs={"preprocess": "cd" * 8}),
        replace(KEY, seed=4),
    ],
)
def test_whatever_a_result_depends_on_changes_the_fingerprint(other: StageKey):
    assert other.fingerprint != KEY.fingerprint


def test_a_failure_while_publishing_leaves_no_published_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    scratch = scratch_dir(tmp_path, KEY)
    (scratch / "a").write_text("one")
    with monkeypatch.context() as patched:

        def fail(path: Path, target: Path) -> None:
            raise OSError(errno.EIO, "Input/output error")

        patched.setattr(Path, "rename", fail)
        with pytest.raises(ArtifactError, match="Input/output error"):
            publish(tmp_path, KEY, {}, seconds=0, peak_bytes=0)
    assert find_artifact(tmp_path, KEY) is None
    assert leftovers(tmp_path) == [scratch]
    assert publish(tmp_path, KEY, {}, seconds=0, peak_bytes=0) == find_artifact(tmp_path, KEY)
    assert leftovers(tmp_path) == []


@pytest.mark.parametrize("damage", ["missing", "longer", "same size"])
def test_check_notices_damage_and_says_what_to_run(tmp_path: Path, damage: str):
    artifact = publish_files(tmp_path, a="one", b="two")
    file = artifact.path / "a"
    if damage == "missing":
        file.unlink()
    else:
        file.write_text("one!" if damage == "longer" else "onE")
    with pytest.raises(ArtifactError, match="missing" if damage == "missing" else "altered") as caught:
        artifact.check(file)
    assert "slipstream profile --force" in str(caught.value.hint)
    assert artifact.check(artifact.path / "b").read_text() == "two"


@pytest.mark.parametrize("manifest", [None, "", "{broken", "[]", "3", "{}"])
def test_a_folder_without_a_sound_manifest_is_no_artifact(tmp_path: Path, manifest: str | None):
    if manifest is not None:
        (tmp_path / "manifest.json").write_text(manifest)
    with pytest.raises(ArtifactError, match=r"expected a published artifact|is damaged"):
        open_artifact(tmp_path)


def test_removing_an_artifact_forgets_its_scratch_folder_too(tmp_path: Path):
    artifact = publish_files(tmp_path, a="one")
    scratch = scratch_dir(tmp_path, KEY)
    remove_artifact(tmp_path, KEY)
    remove_artifact(tmp_path, KEY)
    assert not artifact.path.exists()
    assert not scratch.exists()


@given(st.recursive(st.none() | st.integers() | st.text(max_size=5), lambda inner: st.lists(inner, max_size=3)))
def test_json_is_written_whole(tmp_path_factory: pytest.TempPathFactory, value: object):
    path = tmp_path_factory.getbasetemp() / "value.json"
    write_json(path, value)
    assert json.loads(path.read_text()) == value


def test_an_atomic_write_that_fails_leaves_the_old_file_and_nothing_else(tmp_path: Path):
    path = tmp_path / "deep" / "file"
    with write_atomically(path) as partial:
        partial.write_text("old")
    with pytest.raises(RuntimeError), write_atomically(path) as partial:
        partial.write_text("new")
        raise RuntimeError
    assert path.read_text() == "old"
    assert [entry.name for entry in path.parent.iterdir()] == ["file"]


def test_a_full_disk_is_a_capacity_error_and_names_the_way_out(tmp_path: Path):
    with pytest.raises(CapacityError, match="no space left") as caught, wrap_write_errors(tmp_path / "x"):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    assert "--runs" in str(caught.value.hint)


def test_a_folder_that_cannot_be_written_is_an_artifact_error(tmp_path: Path):
    # a file where a folder should be: refused for every user, root included
    (tmp_path / "taken").write_text("")
    with pytest.raises(ArtifactError, match="cannot write") as caught:
        scratch_dir(tmp_path / "taken", KEY)
    assert "--runs" in str(caught.value.hint)


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_a_read_only_folder_is_an_artifact_error(tmp_path: Path):
    tmp_path.chmod(0o500)
    try:
        with pytest.raises(ArtifactError, match="cannot write"), write_atomically(tmp_path / "file"):
            pass
    finally:
        tmp_path.chmod(0o700)


@pytest.mark.parametrize("size", [0, 5, (1 << 22) + 1])
def test_a_file_hash_covers_every_byte(tmp_path: Path, size: int):
    path = tmp_path / "file"
    path.write_bytes(bytes(size))
    assert hash_file(path) == xxhash.xxh3_64_hexdigest(bytes(size))


# --- altered after publishing --------------------------------------------------------------------------------


def test_nothing_is_altered_at_first(tmp_path: Path):
    artifact = publish_files(tmp_path, a="one", sub__b="two")
    assert artifact.find_altered() == artifact.find_altered(by_hash=True) == []


def test_altered_files_show_by_size_or_time_without_hashing_the_others(tmp_path: Path, monkeypatch):
    artifact = publish_files(tmp_path, a="one", b="two", c="three", d="four")
    long_ago = (artifact.path / "manifest.json").stat().st_mtime_ns - 10**9
    for name in "abcd":
        os.utime(artifact.path / name, ns=(long_ago, long_ago))
    (artifact.path / "a").unlink()
    (artifact.path / "b").write_text("longer")
    (artifact.path / "c").write_text("Three")
    hashed: list[str] = []
    monkeypatch.setattr("slipstream.io.artifacts.hash_file", lambda path: hashed.append(path.name) or "")
    assert artifact.find_altered() == ["a", "b", "c"]
    assert hashed == ["c"]


def test_a_touched_or_copied_file_is_not_taken_for_altered(tmp_path: Path):
    artifact = publish_files(tmp_path, a="one")
    os.utime(artifact.path / "a")
    assert artifact.find_altered() == []


def test_hashing_finds_what_size_and_time_hide(tmp_path: Path):
    artifact = publish_files(tmp_path, a="one")
    long_ago = (artifact.path / "manifest.json").stat().st_mtime_ns - 10**9
    (artifact.path / "a").write_text("onE")
    os.utime(artifact.path / "a", ns=(long_ago, long_ago))
    assert artifact.find_altered() == []
    assert artifact.find_altered(by_hash=True) == ["a"]


# --- names in a manifest -------------------------------------------------------------------------------------


def rewrite_outputs(artifact_path: Path, outputs: object) -> None:
    manifest = json.loads((artifact_path / "manifest.json").read_text())
    (artifact_path / "manifest.json").write_text(json.dumps(manifest | {"outputs": outputs}))


@pytest.mark.parametrize("name", ["/etc/hostname", "../outside", "sub/../../outside", "", ".", "a\0b"])
def test_names_that_leave_the_folder_are_refused(tmp_path: Path, name: str):
    artifact = publish_files(tmp_path, a="one")
    rewrite_outputs(artifact.path, {name: {"bytes": 3, "xxh3": "0" * 16}})
    with pytest.raises(ArtifactError, match=r"is damaged: output .* is not inside") as caught:
        open_artifact(artifact.path)
    assert str(artifact.path) in str(caught.value.hint)


@pytest.mark.parametrize("listed", ["link", "folder/secret"])
def test_links_that_leave_the_folder_are_refused(tmp_path: Path, listed: str):
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "secret").write_text("one")
    artifact = publish_files(tmp_path, a="one")
    (artifact.path / "link").symlink_to(tmp_path / "elsewhere" / "secret")
    (artifact.path / "folder").symlink_to(tmp_path / "elsewhere")
    rewrite_outputs(artifact.path, {listed: artifact.manifest["outputs"]["a"]})
    with pytest.raises(ArtifactError, match="link that leads out"):
        open_artifact(artifact.path)


def test_a_run_folder_reached_through_a_link_is_like_any_other(tmp_path: Path):
    artifact = publish_files(tmp_path / "real", a="one")
    (tmp_path / "alias").symlink_to(tmp_path / "real")
    opened = open_artifact(tmp_path / "alias" / artifact.path.relative_to(tmp_path / "real"))
    assert opened.check(opened.path / "a").read_text() == "one"


@pytest.mark.parametrize(
    "outputs", [None, [], 3, {"a": 3}, {"a": {"bytes": 3}}, {"a": {"bytes": "3", "xxh3": "0"}}, {"a": {"xxh3": "0"}}]
)
def test_outputs_of_another_form_are_a_damaged_manifest(tmp_path: Path, outputs: object):
    artifact = publish_files(tmp_path, a="one")
    rewrite_outputs(artifact.path, outputs)
    with pytest.raises(ArtifactError, match="is damaged"):
        open_artifact(artifact.path)


# --- files that come later -----------------------------------------------------------------------------------


def test_a_file_added_later_is_listed_and_checked_like_the_others(tmp_path: Path):
    added = add_output(publish_files(tmp_path, a="one"), "note.json", {"verdict": "equal"})
    found = find_artifact(tmp_path, KEY)
    assert found == added
    assert list(found.manifest["outputs"]) == ["a", "note.json"]
    assert found.find_altered(by_hash=True) == []
    assert json.loads(found.check(found.path / "note.json").read_text()) == {"verdict": "equal"}
    (found.path / "note.json").write_text('{"verdict": "better"}')
    assert found.find_altered() == ["note.json"]


def test_a_file_added_again_replaces_the_first(tmp_path: Path):
    artifact = add_output(publish_files(tmp_path, a="one"), "note.json", [1])
    (artifact.path / "note.json").write_text("broken")
    again = add_output(artifact, "note.json", [2])
    assert open_artifact(artifact.path).find_altered(by_hash=True) == []
    assert json.loads((again.path / "note.json").read_text()) == [2]


def test_nothing_is_added_to_an_artifact_that_was_altered_in_secret(tmp_path: Path):
    artifact = publish_files(tmp_path, a="one")
    file = artifact.path / "a"
    times = file.stat()
    file.write_text("two")
    os.utime(file, ns=(times.st_atime_ns, times.st_mtime_ns))
    assert artifact.find_altered() == [], "size and time hide it"
    with pytest.raises(ArtifactError, match=r"altered or removed .*: `a`"):
        add_output(artifact, "note.json", 1)
    assert not (artifact.path / "note.json").exists()


def test_a_kill_before_the_manifest_leaves_the_artifact_as_it_was(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    artifact = publish_files(tmp_path, a="one")
    manifest = (artifact.path / "manifest.json").read_bytes()
    monkeypatch.setattr(
        "slipstream.io.artifacts.hash_file", lambda path: 1 / 0 if path.name == "note.json" else hash_file(path)
    )
    with pytest.raises(ZeroDivisionError):
        add_output(artifact, "note.json", 1)
    assert (artifact.path / "manifest.json").read_bytes() == manifest
    assert open_artifact(artifact.path).find_altered() == []


def test_attempts_at_one_file_do_not_get_in_each_others_way(tmp_path: Path):
    with attempt(), write_atomically(tmp_path / "part") as first:
        first.write_text("first")
        with attempt():
            write_json(tmp_path / "part", "second")
        assert json.loads((tmp_path / "part").read_text()) == "second"
    assert (tmp_path / "part").read_text() == "first"
    assert [path.name for path in tmp_path.iterdir()] == ["part"]


def test_an_attempt_that_nobody_waits_for_writes_nothing(tmp_path: Path):
    claims = [tmp_path / "claim-0", tmp_path / "claim-1"]
    for claim in claims:
        claim.touch()
    with attempt(claims):
        write_json(tmp_path / "before", 1)
        claims[1].unlink()
        with pytest.raises(ArtifactError, match="no longer holds the folder"):
            write_json(tmp_path / "after", 2)
    write_json(tmp_path / "alone", 3)
    assert {path.name for path in tmp_path.iterdir()} == {"claim-0", "before", "alone"}
