"""Installing, polling and rolling back on a device; what must not be installed there, and what is said then."""

from __future__ import annotations

import json
import random
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jsonschema
import pytest
from bundles import (
    Shop,
    change,
    check_confirmed,
    check_running,
    checked_here,
    install,
    spoil_weights,
    step,
    try_install,
)
from conftest import amoeba, sentence
from signers import at_day, make_authority, make_certificate, make_key

from amoeba_deploy.bundle import read_manifest
from amoeba_deploy.delivery.archive import pack
from amoeba_deploy.delivery.signing import Certificate, sign
from amoeba_deploy.device import health
from amoeba_deploy.device.slots import current_slot
from amoeba_deploy.device.state import Refused, read_state
from amoeba_deploy.errors import VerificationFailed

pytest_plugins = ["device_fixtures"]

FLIPS = 120
"""Single bytes of a bundle that are changed, one after the other."""


@pytest.fixture(scope="module", autouse=True)
def quick() -> Iterator[None]:
    """Engines are tried in this process; test_install_health.py is of the process that does it."""
    with checked_here():
        yield


def files(root: Path) -> dict[str, bytes]:
    """All files of a device but those that may change at any command."""
    found = (path for path in root.rglob("*") if path.is_file() and path.relative_to(root).parts[0] != "current")
    return {str(path.relative_to(root)): path.read_bytes() for path in found if path.name != "lock"}


Refusing = Callable[..., str]


@pytest.fixture
def refused(device: Path) -> Refusing:
    """Install something that must be refused with an exit code; its sentence. The device must be as it was."""
    before = files(device)

    def run(code: int, source: object, *options: object) -> str:
        said = sentence(try_install(source, device, *options), code)
        after = check_confirmed(device)
        assert after.running is not None
        assert after.running.serial == 7
        assert files(device) == before
        return said

    return run


def test_a_bundle_is_installed_and_the_next_one_beside_it(empty: Path, seven: Path, eight: Path) -> None:
    first = install(seven, empty, "--device", "raspberry-pi-5")
    assert (first["slot"], first["unchanged"], first["bundle"]["serial"]) == ("a", False, 7)
    assert first["bundle"]["signer"] == "key.pub"
    assert first["health"]["selftest_tokens"] > 0
    assert (empty / "device").read_text() == "raspberry-pi-5\n"
    check_confirmed(empty)
    second = install(eight, empty)
    assert second["slot"] == "b"
    state = check_confirmed(empty)
    assert (state.confirmed, state.previous, state.highest_serial) == ("b", "a", 8)
    done = amoeba("run", empty / "current", "-p", "Question: Where", "--tokens", 4, "--json", "--quiet")
    assert json.loads(done.stdout)["tokens"] > 0
    done = amoeba("bundle", "status", "--root", empty)
    assert "runs amoeba-demo-7m 6x0.5 in onnx int8 (release 8, signed by key.pub), in slot b" in done.stdout
    assert "kept for a rollback: amoeba-demo-7m 6x0.5 in onnx int8 (release 7, signed by key.pub)" in done.stdout


def test_what_runs_already_is_not_installed_again(device: Path, seven: Path) -> None:
    before = files(device)
    assert install(seven, device)["unchanged"] is True
    assert files(device) == before
    assert "already, nothing was done" in try_install(seven, device).stdout


def test_what_runs_is_installed_again_where_a_file_of_it_is_lost(device: Path, seven: Path) -> None:
    (device / "current" / "tokenizer.json").unlink()
    done = install(seven, device)
    assert (done["slot"], done["unchanged"]) == ("b", False)
    assert check_confirmed(device).confirmed == "b"


def test_an_archive_is_installed(empty: Path, seven: Path, eight: Path, tmp_path: Path) -> None:
    for serial, bundle in ((7, seven), (8, eight)):
        file = tmp_path / f"{serial}.tar.zst"
        pack(bundle, file)
        assert install(file, empty)["bundle"]["serial"] == serial
        check_confirmed(empty)
        assert install(file, empty)["unchanged"] is True


def test_rolling_back_goes_back_and_forth(device: Path, eight: Path) -> None:
    install(eight, device)
    done = amoeba("bundle", "rollback", "--root", device, "--json", "--quiet")
    assert done.exit_code == 0, done.output
    value = json.loads(done.stdout)
    assert (value["bundle"]["serial"], value["left"]["serial"]) == (7, 8)
    state = check_confirmed(device)
    assert (state.confirmed, state.previous, state.highest_serial) == ("a", "b", 8)
    # A timer that polls the tag does not undo what somebody decided.
    assert "it was rolled back from" in sentence(try_install(eight, device), 5)
    assert amoeba("bundle", "rollback", "--root", device, "--quiet").exit_code == 0
    running = check_confirmed(device).running
    assert running is not None
    assert running.serial == 8


def test_a_bundle_that_was_left_is_installed_when_it_is_asked_for(device: Path, eight: Path) -> None:
    install(eight, device)
    assert amoeba("bundle", "rollback", "--root", device, "--quiet").exit_code == 0
    install(eight, device, "--retry")
    assert check_confirmed(device).refused == []


def test_every_bundle_that_failed_is_remembered_and_the_oldest_forgotten(device: Path, shop: Shop, eight: Path) -> None:
    failed = [shop.release(8, f"failed-{number}", note=str(number)) for number in range(3)]
    for made in failed:
        assert "is not healthy here" in sentence(try_install(made, device, "--health", "false"), 5)
    install(eight, device)
    assert amoeba("bundle", "rollback", "--root", device, "--quiet").exit_code == 0
    for made in failed:
        assert "is not installed again" in sentence(try_install(made, device), 5)
    assert "it was rolled back from" in sentence(try_install(eight, device), 5)
    reasons = [each["reason"] for each in shown(device)["refused"]]
    assert len(reasons) == 4
    assert reasons[0] == "it was rolled back from"
    install(failed[0], device, "--retry")
    assert len(shown(device)["refused"]) == 3
    assert amoeba("bundle", "status", "--root", device).stdout.count("not installed again by itself") == 3
    state = read_state(device)
    many = [Refused(digest=f"sha256:{number:064x}", reason="x", at="y") for number in range(20)]
    for each in many:
        state = state.refusing(each)
    assert state.refused == many[:3:-1]
    again = state.refusing(many[10])
    assert (again.refused[0], len(again.refused)) == (many[10], 16)


def test_there_is_nothing_to_roll_back_to(device: Path) -> None:
    assert "keeps no bundle to go back to" in sentence(amoeba("bundle", "rollback", "--root", device, "--quiet"), 2)


def test_steps_run_in_the_slot_and_what_they_make_is_verified_later(device: Path, shop: Shop) -> None:
    made = shop.release(8, "stepped", steps=[step("mkdir made && echo 1 > made/file"), step("cp made/file engine/two")])
    done = install(made, device)
    assert done["steps"] == 2
    state = check_confirmed(device)
    slot = state.running
    assert slot is not None
    assert slot.manifest != slot.delivered
    assert (device / "current" / "engine" / "two").read_text() == "1\n"
    assert read_manifest(device / "current")["steps"] == []
    assert install(made, device)["unchanged"] is True
    amoeba("bundle", "rollback", "--root", device, "--quiet")
    amoeba("bundle", "rollback", "--root", device, "--quiet")
    running = check_confirmed(device).running
    assert running is not None
    assert running.delivered == slot.delivered


def test_a_step_that_fails_leaves_what_ran(device: Path, shop: Shop) -> None:
    made = shop.release(8, "failing", steps=[step("mkdir made"), step("echo no licence >&2; exit 3")])
    said = sentence(try_install(made, device), 1)
    assert "failed with status 3: no licence" in said
    assert str(made) in said
    assert check_confirmed(device).previous is None


def test_a_step_whose_tool_is_missing(device: Path, shop: Shop) -> None:
    needs = {"does": "compile", "command": "no-such-tool x", "needs": "the tool of tools", "where": "device"}
    said = sentence(try_install(shop.release(8, "toolless", steps=[needs]), device), 6)
    assert "install the tool of tools" in said
    check_confirmed(device)


def test_a_step_for_a_host_is_not_run_here(refused: Refusing, shop: Shop) -> None:
    made = shop.release(8, "for-a-host", steps=[step("true") | {"where": "host"}])
    assert "is for a host" in refused(6, made)


# Trust.


def test_no_key_is_trusted(tmp_path: Path, seven: Path) -> None:
    said = sentence(try_install(seven, tmp_path / "root"), 2)
    assert "holds no public key and no certificate authority" in said
    assert "--unsigned" in said
    assert current_slot(tmp_path / "root") is None


def test_keys_may_be_named(tmp_path: Path, seven: Path, shop: Shop) -> None:
    install(seven, tmp_path / "root", "--trust", shop.pair.public)
    other = make_key(tmp_path / "keys", "other")
    assert "none of the trusted keys" in sentence(try_install(seven, tmp_path / "two", "--trust", other.public), 5)


def test_a_trusted_key_that_is_not_there_is_refused_although_nothing_is_to_be_done(
    refused: Refusing, seven: Path, tmp_path: Path
) -> None:
    missing = tmp_path / "nokey.pub"
    assert f"{missing}: cannot be read" in refused(2, seven, "--trust", missing)
    (tmp_path / "trust").mkdir()
    assert "holds no public key" in refused(2, seven, "--trust", tmp_path / "trust")


@pytest.mark.parametrize("scheme", ["http://", "https://", "oci://"])
def test_a_reference_with_a_scheme(refused: Refusing, scheme: str) -> None:
    said = refused(2, f"{scheme}localhost:5000/team/model:1")
    assert f"leave out {scheme}, and write 'localhost:5000/team/model:1'" in said


def test_a_wrong_key(refused: Refusing, copy: Path, tmp_path: Path) -> None:
    sign(copy, make_key(tmp_path / "keys", "other").private, serial=9)
    assert "signed by none of the trusted keys" in refused(5, copy)


def test_an_unsigned_bundle(refused: Refusing, copy: Path) -> None:
    change(copy)
    assert "is not signed" in refused(5, copy)


def test_an_unsigned_bundle_that_is_asked_for(tmp_path: Path, shop: Shop) -> None:
    done = try_install(shop.built, tmp_path / "root", "--unsigned")
    assert "(no release, its signature was not checked)" in done.stdout
    state = check_confirmed(tmp_path / "root")
    assert state.running is not None
    assert state.running.signer is None


@pytest.mark.parametrize(("days", "code"), [((-30, 30), 0), ((-60, -30), 5), ((30, 60), 5)])
def test_certificates(shop: Shop, tmp_path: Path, days: tuple[int, int], code: int) -> None:
    authority = make_authority(tmp_path / "keys")
    pair, certificate = make_certificate(tmp_path / "keys", authority, days=days)
    bundle = Path(shutil.copytree(shop.built, tmp_path / "bundle"))
    with at_day(sum(days) / 2):
        sign(bundle, pair.private, certificate=Certificate(certificate), serial=1)
    (root := tmp_path / "root" / "trust").mkdir(parents=True)
    shutil.copy(authority.file, root)
    done = try_install(bundle, tmp_path / "root")
    assert done.exit_code == code, done.output
    assert (current_slot(tmp_path / "root") is None) == (code != 0)


def test_a_certificate_of_another_authority(shop: Shop, tmp_path: Path) -> None:
    trusted, other = (make_authority(tmp_path / name, name) for name in ("trusted", "other"))
    pair, certificate = make_certificate(tmp_path / "keys", other)
    bundle = Path(shutil.copytree(shop.built, tmp_path / "bundle"))
    sign(bundle, pair.private, certificate=Certificate(certificate), serial=1)
    sentence(try_install(bundle, tmp_path / "root", "--trust", trusted.file), 5)


def test_every_flipped_byte(device: Path, copy: Path, seven: Path) -> None:
    drawn = random.Random(5)
    names = sorted(path for path in copy.rglob("*") if path.is_file())
    assert {"model.sig", "release.json", "manifest.json", "measured.json", "provenance.json"} <= {n.name for n in names}
    for turn in range(FLIPS):
        file = names[turn % len(names)]
        data = bytearray(file.read_bytes())
        position = drawn.randrange(len(data))
        data[position] ^= 1 << drawn.randrange(8)
        file.write_bytes(data)
        done = try_install(copy, device)
        unseen = file.name not in ("manifest.json", "release.json")
        if unseen:  # by the digest it is what runs, and nothing is fetched: ask a device that runs nothing
            root = device.parent / f"fresh-{turn}"
            shutil.copytree(device / "trust", root / "trust")
            done = try_install(copy, root)
            assert current_slot(root) is None
        assert done.exit_code in (2, 5), (file, position, done.output)
        assert len(done.stderr.splitlines()) == 1
        data[position] = (seven / file.relative_to(copy)).read_bytes()[position]
        file.write_bytes(data)
    check_confirmed(device)


def test_an_added_file(shop: Shop, refused: Refusing) -> None:
    made = shop.release(8, "added")
    (made / "engine" / "more").write_bytes(b"x")
    refused(5, made)


def test_a_missing_file(shop: Shop, refused: Refusing) -> None:
    made = shop.release(8, "missing")
    (made / "tokenizer.json").unlink()
    refused(5, made)


@pytest.mark.parametrize("to", ["/etc/hostname", "config.json", "nowhere"])
def test_a_link_in_a_bundle(shop: Shop, refused: Refusing, to: str) -> None:
    made = shop.release(8, f"linked-{Path(to).name}")
    (made / "tokenizer_config.json").unlink()
    (made / "tokenizer_config.json").symlink_to(to)
    assert "is a link" in refused(5, made)


def test_a_folder_that_is_a_link(shop: Shop, refused: Refusing) -> None:
    made = shop.release(8, "linked-folder")
    (made / "engine").rename(made.parent / "elsewhere")
    (made / "engine").symlink_to(made.parent / "elsewhere")
    assert "is a link" in refused(5, made)


def test_the_source_may_change_after_it_was_fetched(shop: Shop, device: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from amoeba_deploy.device import install as module

    made = shop.release(8, "changing")
    verified = module._verified

    def spoil(*arguments: Any) -> Any:
        found = verified(*arguments)
        for file in made.rglob("*"):
            if file.is_file():
                file.write_bytes(b"spoilt")
        return found

    monkeypatch.setattr(module, "_verified", spoil)
    install(made, device)
    check_confirmed(device)


# Versions.


def test_a_replayed_older_version(shop: Shop, device: Path, eight: Path) -> None:
    install(eight, device)
    six = shop.release(6, "six")
    said = sentence(try_install(six, device), 2)
    assert "is release 6, and this device had release 8 already" in said
    assert check_confirmed(device).confirmed == "b"
    # Nor after a rollback: the highest ever counts.
    amoeba("bundle", "rollback", "--root", device, "--quiet")
    sentence(try_install(shop.release(7, "another-seven", device="raspberry-pi-5", note="x"), device), 2)
    install(six, device, "--allow-older")
    assert check_confirmed(device).highest_serial == 8


def test_no_release_after_one(refused: Refusing, copy: Path) -> None:
    change(copy, note="newer")
    assert "has no release number" in refused(2, copy, "--unsigned")


def test_the_same_release_number_again(device: Path, shop: Shop) -> None:
    install(shop.release(7, "seven-b", note="rebuilt"), device)
    check_confirmed(device)


# Fitness.


def test_a_bundle_for_another_name(refused: Refusing, shop: Shop) -> None:
    said = refused(2, shop.release(8, "other-name", device="orin-nx"))
    assert "was built for the device orin-nx, and this one is raspberry-pi-5" in said


def test_a_name_that_is_no_text(device: Path, eight: Path) -> None:
    (device / "device").write_bytes(b"\xff\xfe")
    sentence(try_install(eight, device), 2)
    check_confirmed(device)


def test_a_device_keeps_its_name(refused: Refusing, seven: Path) -> None:
    assert "says that this device is raspberry-pi-5" in refused(2, seven, "--device", "orin-nx")


def identity(shop: Shop, **changes: Any) -> dict[str, Any]:
    return dict(read_manifest(shop.built)["identity"]) | changes


def test_a_bundle_for_another_chip(refused: Refusing, shop: Shop) -> None:
    made = shop.release(8, "other-chip", identity=identity(shop, chip="sm_87"))
    assert "was built for sm_87, and this machine is" in refused(2, made)


def test_a_bundle_bound_to_another_engine_version(refused: Refusing, shop: Shop) -> None:
    bound = identity(shop, bound=["onnxruntime"], versions={"onnxruntime": "0.1"})
    assert "was built with onnxruntime 0.1, which is" in refused(2, shop.release(8, "other-version", identity=bound))


def test_a_bundle_that_needs_more_memory(refused: Refusing, shop: Shop) -> None:
    predicted = read_manifest(shop.built)["predicted"] | {"memory_bytes": 10**15}
    said = refused(2, shop.release(8, "large", predicted=predicted))
    assert "needs 1000000.00 GB of memory, and this machine has" in said


def test_an_engine_that_is_not_installed(device: Path, eight: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from amoeba_deploy.backends import onnx

    with monkeypatch.context() as patched:
        patched.setattr(onnx.BACKEND.__class__, "cannot_run", lambda *_: "onnxruntime is not installed")
        said = sentence(try_install(eight, device), 6)
    assert "its onnx engine cannot run here: onnxruntime is not installed" in said
    assert check_confirmed(device).confirmed == "a"


@pytest.mark.parametrize("entry", ["predicted", "identity", "steps", "budget", "device"])
def test_a_damaged_manifest_that_is_signed(refused: Refusing, shop: Shop, entry: str) -> None:
    assert "manifest.json" in refused(2, shop.release(8, f"damaged-{entry}", **{entry: 7}))


# What was tampered with on the device.


@pytest.mark.parametrize("name", ["engine/model.onnx", "manifest.json", "selftest.json"])
def test_a_slot_that_was_changed_is_not_rolled_back_to(device: Path, eight: Path, name: str) -> None:
    install(eight, device)
    file = device / "slots" / "a" / name
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 4
    file.write_bytes(data)
    sentence(amoeba("bundle", "rollback", "--root", device, "--quiet"), 5)
    assert check_confirmed(device).confirmed == "b"


def test_a_slot_that_was_changed_with_its_manifest_is_not_rolled_back_to(device: Path, eight: Path) -> None:
    install(eight, device)
    spoil_weights(device / "slots" / "a")
    assert "was changed after it was installed" in sentence(
        amoeba("bundle", "rollback", "--root", device, "--quiet"), 5
    )
    assert check_confirmed(device).confirmed == "b"


def test_a_slot_that_became_a_link_is_not_rolled_back_to(device: Path, eight: Path) -> None:
    install(eight, device)
    (device / "slots" / "a").rename(device / "elsewhere")
    (device / "slots" / "a").symlink_to(device / "elsewhere")
    sentence(amoeba("bundle", "rollback", "--root", device, "--quiet"), 5)


@pytest.mark.parametrize("target", ["slots/b", "/etc", "slots/../slots/a", "slots/c"])
def test_a_swapped_link_is_seen_and_set_right(device: Path, eight: Path, target: str) -> None:
    (device / "current").unlink()
    (device / "current").symlink_to(target)
    assert "--recover" in sentence(amoeba("bundle", "status", "--root", device, "--quiet"), 5)
    done = amoeba("bundle", "status", "--root", device, "--recover", "--json", "--quiet")
    assert "was changed and is set right" in json.loads(done.stdout)["recovered"][0]
    assert check_confirmed(device).confirmed == "a"
    (device / "current").unlink()
    (device / "current").symlink_to(target)
    install(eight, device)
    assert check_confirmed(device).confirmed == "b"


def test_a_link_that_is_a_folder_is_left_alone(device: Path, eight: Path) -> None:
    (device / "current").unlink()
    (device / "current").mkdir()
    (device / "current" / "precious").write_text("x")
    for command in (("status",), ("status", "--recover"), ("install", eight), ("rollback",)):
        said = sentence(amoeba("bundle", *command, "--root", device, "--quiet"), 5)
        assert "is no link" in said
    assert (device / "current" / "precious").read_text() == "x"


@pytest.mark.parametrize("name", ["slots", "staging"])
def test_a_folder_of_the_device_that_became_a_link(device: Path, eight: Path, name: str) -> None:
    (device / name).rename(device / "elsewhere")
    (device / name).symlink_to(device / "elsewhere")
    assert "is a link, and a folder belongs there" in sentence(try_install(eight, device), 2)


DAMAGE: dict[str, Callable[[Path], object]] = {
    "empty": lambda file: file.write_text(""),
    "torn": lambda file: file.write_bytes(file.read_bytes()[:300]),
    "another version": lambda file: file.write_text(file.read_text().replace("device-state/1", "device-state/2")),
    "an unknown slot": lambda file: file.write_text(file.read_text().replace('"confirmed": "b"', '"confirmed": "c"')),
    "an empty slot in use": lambda file: file.write_text(json.dumps(json.loads(file.read_text()) | {"slots": {}})),
    "a list": lambda file: file.write_text("[]"),
    "zeros": lambda file: file.write_bytes(bytes(file.stat().st_size)),
    "missing": lambda file: file.unlink(),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_state_is_rebuilt(device: Path, shop: Shop, damage: str) -> None:
    made = shop.place / "stepped-eight"
    if not made.exists():
        shop.release(8, "stepped-eight", steps=[step("echo 1 > engine/more")])
    install(made, device)
    right = read_state(device)
    DAMAGE[damage](device / "state.json")
    for command in (("status",), ("install", made), ("rollback",)):
        said = sentence(amoeba("bundle", *command, "--root", device, "--quiet"), 2)
        assert "state.json" in said
        assert "--recover" in said
    done = amoeba("bundle", "status", "--root", device, "--recover", "--json", "--quiet")
    assert done.exit_code == 0, done.output
    assert "is rebuilt: slot b works" in json.loads(done.stdout)["recovered"][0]
    assert check_confirmed(device) == right
    assert amoeba("bundle", "rollback", "--root", device, "--quiet").exit_code == 0


def test_a_damaged_state_and_a_damaged_slot(device: Path, eight: Path) -> None:
    install(eight, device)
    (device / "state.json").unlink()
    (device / "slots" / "b" / "tokenizer.json").write_text("{}")
    done = amoeba("bundle", "status", "--root", device, "--recover", "--json", "--quiet")
    assert json.loads(done.stdout)["confirmed"] == "a"
    state = check_confirmed(device)
    assert (state.slots["b"], state.highest_serial) == (None, 7)


def test_a_damaged_state_without_records(device: Path, eight: Path) -> None:
    install(eight, device)
    for name in ("state.json", "slots/a.json", "slots/b.json"):
        (device / name).write_text("?")
    assert amoeba("bundle", "status", "--root", device, "--recover", "--quiet").exit_code == 0
    state = check_confirmed(device)
    assert (state.confirmed, state.previous, state.highest_serial) == ("b", "a", 8)


def test_a_damaged_state_and_no_slot_that_is_whole(device: Path) -> None:
    (device / "state.json").write_text("?")
    (device / "slots" / "a" / "tokenizer.json").write_text("{}")
    said = sentence(amoeba("bundle", "status", "--root", device, "--recover", "--quiet"), 5)
    assert "neither slot holds a bundle that is whole and works" in said


# What status says of what is not there.


def shown(root: Path, *options: str) -> dict[str, Any]:
    done = amoeba("bundle", "status", "--root", root, "--json", "--quiet", *options)
    assert done.exit_code == 0, done.output
    found: dict[str, Any] = json.loads(done.stdout)
    return found


def flip(file: Path) -> None:
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 4
    file.write_bytes(data)


SPOILT: dict[str, Callable[[Path], object]] = {
    "no manifest": lambda slot: (slot / "manifest.json").unlink(),
    "another manifest": lambda slot: flip(slot / "manifest.json"),
    "no file": lambda slot: (slot / "tokenizer.json").unlink(),
    "a shorter file": lambda slot: (slot / "tokenizer.json").write_text("{}"),
    "no folder": lambda slot: shutil.rmtree(slot),
    "a link": lambda slot: slot.rename(slot.parent.parent / "elsewhere") and slot.symlink_to("../elsewhere"),
}


@pytest.mark.parametrize("spoilt", SPOILT)
def test_status_of_a_running_slot_that_is_damaged(device: Path, eight: Path, spoilt: str) -> None:
    SPOILT[spoilt](device / "slots" / "a")
    for options in ((), ("--check",)):
        said = sentence(amoeba("bundle", "status", "--root", device, "--quiet", *options), 5)
        assert "so what runs is damaged" in said
        assert str(device / "slots" / "a") in said
    said = sentence(amoeba("bundle", "status", "--root", device, "--recover", "--quiet"), 5)
    assert "no other bundle is kept, so install one" in said
    install(eight, device)
    state = check_running(device)
    assert state is not None
    assert (state.confirmed, state.pending) == ("b", None)


@pytest.mark.parametrize("spoilt", SPOILT)
def test_recovery_goes_to_the_other_slot_where_what_runs_is_damaged(device: Path, eight: Path, spoilt: str) -> None:
    install(eight, device)
    SPOILT[spoilt](device / "slots" / "b")
    sentence(amoeba("bundle", "status", "--root", device, "--quiet"), 5)
    (done,) = shown(device, "--recover")["recovered"]
    assert done.endswith("slot a, which ran before, runs again")
    state = check_confirmed(device)
    assert (state.confirmed, state.slots["b"], state.highest_serial) == ("a", None, 8)
    install(eight, device)


@pytest.mark.parametrize("target", [None, "slots/a", "/etc"])
def test_recovery_goes_to_the_other_slot_where_the_link_is_wrong_too(
    device: Path, eight: Path, target: str | None
) -> None:
    install(eight, device)
    flip(device / "slots" / "b" / "tokenizer.json")
    (device / "current").unlink()
    if target:
        (device / "current").symlink_to(target)
    shown(device, "--recover")
    assert check_confirmed(device).confirmed == "a"


def test_a_link_that_is_missing_is_said_and_set_right(device: Path) -> None:
    (device / "current").unlink()
    said = sentence(amoeba("bundle", "status", "--root", device, "--quiet"), 5)
    assert "is missing, so nothing runs, and slot a is confirmed; run" in said
    assert "set right" in shown(device, "--recover")["recovered"][0]
    assert check_confirmed(device).confirmed == "a"


def test_neither_slot_is_whole(device: Path, eight: Path) -> None:
    install(eight, device)
    for name in "ab":
        flip(device / "slots" / name / "tokenizer.json")
    (device / "current").unlink()
    said = sentence(amoeba("bundle", "status", "--root", device, "--recover", "--quiet"), 5)
    assert "the other slot is damaged, too" in said
    assert current_slot(device) is None
    assert install(eight, device)["bundle"]["serial"] == 8
    assert read_state(device).highest_serial == 8
    assert shown(device)["confirmed"] == "a"


@pytest.mark.parametrize("spoilt", SPOILT)
def test_a_spare_slot_that_is_damaged_is_not_kept_for_a_rollback(device: Path, eight: Path, spoilt: str) -> None:
    install(eight, device)
    SPOILT[spoilt](device / "slots" / "a")
    done = amoeba("bundle", "status", "--root", device, "--quiet")
    assert done.exit_code == 0
    assert "kept for a rollback" not in done.stdout
    assert f"damaged, so there is no rollback: {device / 'slots' / 'a'}" in done.stdout
    assert shown(device)["previous"] is None
    assert "what runs goes on" in sentence(amoeba("bundle", "rollback", "--root", device, "--quiet"), 5)


def test_a_check_hashes_every_file_and_runs_the_selftest(device: Path, eight: Path) -> None:
    assert shown(device)["checked"] is None
    assert shown(device, "--check")["checked"]["selftest_tokens"] > 0
    assert "every file as it was installed" in amoeba("bundle", "status", "--root", device, "--check").stdout
    install(eight, device)
    flip(device / "slots" / "b" / "tokenizer.json")
    shown(device)
    assert "differs" in sentence(amoeba("bundle", "status", "--root", device, "--check", "--quiet"), 5)
    assert shown(device, "--recover", "--check")["recovered"][0].endswith("runs again")
    assert check_confirmed(device).confirmed == "a"


def unable(*_: object) -> health.Health:
    """What the process of a health check says where an engine's package was removed."""
    raise VerificationFailed("its onnx engine cannot run here: onnxruntime is not installed")


def test_what_is_whole_and_not_healthy_is_said_and_kept(
    device: Path, eight: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    install(eight, device)
    with monkeypatch.context() as patched:
        patched.setattr(health, "_checked_apart", unable)
        for options in (("--check",), ("--check", "--recover")):
            said = sentence(amoeba("bundle", "status", "--root", device, "--quiet", *options), 5)
            assert "is whole and not healthy: its onnx engine cannot run here" in said
    state = check_confirmed(device)
    assert (state.confirmed, state.previous) == ("b", "a")


# The rest of what a user can meet.


def test_sources_that_are_none(refused: Refusing, tmp_path: Path) -> None:
    assert "no such bundle" in refused(2, tmp_path / "nothing")
    (tmp_path / "folder").mkdir()
    assert "is not a bundle" in refused(2, tmp_path / "folder")
    for name in ("nowhere", "nowhere/at-all:1"):
        said = refused(2, name)
        assert f"{name}: there is no such folder or archive, and a registry's reference begins with its host" in said
        assert "registry.example:5000/team/model:1" in said
    assert "cannot be a tag" in refused(2, "localhost:5000/team/model:-")
    (tmp_path / "file.tar.zst").write_text("x")
    refused(2, tmp_path / "file.tar.zst")


@pytest.mark.parametrize("name", ["current", "slots/a", "staging/bundle"])
def test_a_source_in_the_devices_own_folder(device: Path, seven: Path, name: str) -> None:
    shutil.copytree(seven, device / "staging" / "bundle")
    assert "lies in the device's own folder" in sentence(try_install(device / name, device), 2)
    assert (device / "staging" / "bundle" / "manifest.json").is_file()


def test_status_of_no_folder(tmp_path: Path) -> None:
    for more in ((), ("--recover",)):
        sentence(amoeba("bundle", "status", "--root", tmp_path / "root", "--quiet", *more), 2)
    assert not (tmp_path / "root").exists()


def test_the_state_is_what_its_schema_says(device: Path, eight: Path) -> None:
    schema = json.loads((Path(__file__).parent.parent / "docs/schemas/device-state.schema.json").read_text())
    validator = jsonschema.Draft202012Validator(schema)
    validator.validate(json.loads((device / "state.json").read_text()))
    install(eight, device)
    amoeba("bundle", "rollback", "--root", device, "--quiet")
    value = json.loads((device / "state.json").read_text())
    validator.validate(value)
    for entry in value:
        assert not validator.is_valid({key: found for key, found in value.items() if key != entry})
    for entry in value["slots"]["a"]:
        less = {key: found for key, found in value["slots"]["a"].items() if key != entry}
        assert not validator.is_valid(value | {"slots": value["slots"] | {"a": less}})


def test_a_gpus_architecture_is_asked_of_its_driver(monkeypatch: pytest.MonkeyPatch) -> None:
    from amoeba_deploy.profiles import machine

    class Driver:
        """Two GPUs, of architectures 8.7 and 9.0."""

        def cuInit(self, _flags: int) -> int:  # noqa: N802
            return 0

        def cuDeviceGetCount(self, count: Any) -> int:  # noqa: N802
            count._obj.value = 2
            return 0

        def cuDeviceGet(self, device: Any, index: int) -> int:  # noqa: N802
            device._obj.value = 10 + index
            return 0

        def cuDeviceGetAttribute(self, value: Any, attribute: int, device: Any) -> int:  # noqa: N802
            value._obj.value = {(75, 10): 8, (76, 10): 7, (75, 11): 9, (76, 11): 0}[attribute, device.value]
            return 0

    monkeypatch.setattr(machine.ctypes, "CDLL", lambda _: Driver())
    assert machine._cuda_chips() == ["sm_87", "sm_90"]
    Driver.cuInit = lambda *_: 100  # type: ignore[method-assign]
    assert machine._cuda_chips() == []
