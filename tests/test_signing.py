"""Signing bundles and holding signatures against trusted keys: what was changed, by whom, and when is refused."""

from __future__ import annotations

import datetime
import json
import random
import re
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result
from cryptography import x509
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec, ed25519, rsa
from cryptography.x509.oid import ExtendedKeyUsageOID
from in_toto_attestation.v1.statement import Statement
from signers import Authority, KeyPair, at_day, make_authority, make_certificate, make_key

from amoeba_deploy.bundle import UNLISTED, verify_files
from amoeba_deploy.cli import main
from amoeba_deploy.delivery.keys import key_file
from amoeba_deploy.delivery.signing import Certificate, Trust, read_release, sign, verify_signature
from amoeba_deploy.errors import BadInput, VerificationFailed

FLIPS = 300
"""Single bytes that are changed, one after the other, all over a bundle."""


def amoeba(*arguments: object, **environment: str) -> Result:
    return CliRunner().invoke(main, [str(argument) for argument in arguments], env=environment)


def sentence(result: Result, code: int) -> str:
    """The one sentence of a failure with an exit code."""
    assert result.exit_code == code, result.output
    (line,) = [line for line in result.stderr.splitlines() if line.startswith("amoeba: ")]
    assert "Traceback" not in result.stderr
    return line


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("built") / "bundle"
    options = ("--device", "raspberry-pi-5", "--flow", "onnx", "--precision", "int8", "--shape", "6x0.5", "--no-verify")
    assert amoeba("export", *options, "-o", folder, "--quiet").exit_code == 0
    return folder


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> KeyPair:
    return make_key(tmp_path_factory.mktemp("keys"))


@pytest.fixture
def bundle(built: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(built, tmp_path / "bundle"))


@pytest.fixture
def signed(bundle: Path, pair: KeyPair) -> Path:
    sign(bundle, pair.private, serial=7)
    return bundle


# What holds


def test_a_signed_bundle_holds_against_its_public_key(signed: Path, pair: KeyPair) -> None:
    found = verify_signature(signed, Trust.of([pair.public]))
    assert found.signer == pair.public.name
    assert verify_files(signed, found.digests)["files"].keys() <= found.digests.keys()
    assert set(found.digests) == {p.relative_to(signed).as_posix() for p in signed.rglob("*") if p.is_file()} - {
        "model.sig"
    }


def test_it_holds_under_another_name_and_in_another_place(signed: Path, pair: KeyPair, tmp_path: Path) -> None:
    moved = signed.rename(tmp_path / "elsewhere")
    assert verify_signature(moved, Trust.of([pair.public])).signer == pair.public.name


def test_it_holds_by_way_of_a_link_to_its_folder(signed: Path, pair: KeyPair, tmp_path: Path) -> None:
    (tmp_path / "current").symlink_to(signed)
    found = amoeba("bundle", "verify", tmp_path / "current", "--public-key", pair.public, "--quiet")
    assert found.exit_code == 0, found.output


def test_one_trusted_key_among_several_is_enough(signed: Path, pair: KeyPair, tmp_path: Path) -> None:
    others = [make_key(tmp_path / "trust", f"other{index}").public for index in range(3)]
    shutil.copyfile(pair.public, tmp_path / "trust" / "z.pub")
    (tmp_path / "trust" / "README").write_text("not a key")
    (tmp_path / "trust" / "other0.key").rename(tmp_path / "kept-elsewhere")
    trust = Trust.of_folder(tmp_path / "trust")
    assert verify_signature(signed, trust).signer == "z.pub"
    assert set(trust.keys) == {*others, tmp_path / "trust" / "z.pub"}


@pytest.mark.parametrize("curve", [ec.SECP256R1, ec.SECP384R1, ec.SECP521R1])
def test_every_curve_of_the_library_signs(bundle: Path, tmp_path: Path, curve: type) -> None:
    own = make_key(tmp_path, "own", curve=curve)
    sign(bundle, own.private)
    assert verify_signature(bundle, Trust.of([own.public])).signer == "own.pub"


def test_signing_changes_nothing_that_the_manifest_lists(built: Path, signed: Path) -> None:
    for file in (path for path in built.rglob("*") if path.is_file()):
        assert (signed / file.relative_to(built)).read_bytes() == file.read_bytes()
    added = {path.name for path in signed.iterdir()} - {path.name for path in built.iterdir()}
    assert added == {"model.sig", "release.json"} and added <= UNLISTED


def test_signing_again_replaces_the_signature_and_the_release(signed: Path, pair: KeyPair, tmp_path: Path) -> None:
    other = make_key(tmp_path, "other")
    sign(signed, other.private, serial=8)
    release = read_release(signed)
    assert release is not None and release.serial == 8
    assert verify_signature(signed, Trust.of([other.public])).signer == "other.pub"
    with pytest.raises(VerificationFailed, match="none of the trusted keys"):
        verify_signature(signed, Trust.of([pair.public]))


def test_the_serial_is_the_time_unless_told_otherwise(bundle: Path, pair: KeyPair) -> None:
    first = sign(bundle, pair.private)
    assert 1_700_000_000 < first.serial < 10_000_000_000
    assert first.signed.startswith("20") and first.signed.endswith("+00:00")


def test_the_commands_sign_and_verify(bundle: Path, pair: KeyPair) -> None:
    said = json.loads(amoeba("bundle", "sign", bundle, "--private-key", pair.private, "--serial", 3, "--json").stdout)
    assert said["serial"] == 3
    found = json.loads(amoeba("bundle", "verify", bundle, "--public-key", pair.public, "--json", "--quiet").stdout)
    assert found["signer"] == "key.pub" and found["serial"] == 3 and found["selftest_tokens"] > 0
    assert "signature was not checked" in amoeba("bundle", "verify", bundle, "--quiet").stdout


def test_a_key_with_a_password_signs(bundle: Path, tmp_path: Path) -> None:
    own = make_key(tmp_path, "locked", password=b"open sesame")
    command = ("bundle", "sign", bundle, "--private-key", own.private)
    assert "is encrypted; put its password into AMOEBA_KEY_PASSWORD" in sentence(amoeba(*command), 2)
    said = sentence(amoeba(*command, AMOEBA_KEY_PASSWORD="open barley"), 2)
    assert "the password in AMOEBA_KEY_PASSWORD is not that of this key" in said
    assert not (bundle / "model.sig").exists()
    assert amoeba(*command, AMOEBA_KEY_PASSWORD="open sesame").exit_code == 0
    assert verify_signature(bundle, Trust.of([own.public])).signer == "locked.pub"


def test_a_password_of_a_key_that_has_none(bundle: Path, pair: KeyPair) -> None:
    command = ("bundle", "sign", bundle, "--private-key", pair.private)
    assert "is not encrypted, and AMOEBA_KEY_PASSWORD is set" in sentence(amoeba(*command, AMOEBA_KEY_PASSWORD="x"), 2)


@pytest.mark.parametrize("whole", [True, False], ids=["pem", "path"])
def test_a_key_in_a_variable_signs(bundle: Path, pair: KeyPair, whole: bool) -> None:
    value = pair.private.read_text() if whole else str(pair.private)
    done = amoeba("bundle", "sign", bundle, "--private-key", "env:RELEASE_KEY", RELEASE_KEY=value)
    assert done.exit_code == 0, done.output
    verify_signature(bundle, Trust.of([pair.public]))


def test_a_variable_that_is_not_set_or_holds_no_key(bundle: Path) -> None:
    command = ("bundle", "sign", bundle, "--private-key", "env:RELEASE_KEY")
    assert "the environment variable RELEASE_KEY is not set" in sentence(amoeba(*command), 2)
    damaged = "-----BEGIN PRIVATE KEY-----\nx"
    assert "amoeba: env:RELEASE_KEY: is damaged" in sentence(amoeba(*command, RELEASE_KEY=damaged), 2)


def test_where_a_key_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with key_file("keys/a.pem", tmp_path) as file:
        assert file == tmp_path / "keys" / "a.pem"
    monkeypatch.setenv("RELEASE_KEY", "-----BEGIN X-----\nx\n")
    with key_file("env:RELEASE_KEY", tmp_path) as file:
        assert file.read_text() == "-----BEGIN X-----\nx\n"
        assert file.stat().st_mode & 0o777 == 0o600
    assert not file.exists()


def test_openssls_own_keys_sign(bundle: Path, tmp_path: Path) -> None:
    private, public = tmp_path / "key.pem", tmp_path / "key.pub"
    subprocess.run(["openssl", "ecparam", "-name", "prime256v1", "-genkey", "-noout", "-out", private], check=True)
    subprocess.run(["openssl", "ec", "-in", private, "-pubout", "-out", public], check=True, capture_output=True)
    sign(bundle, private)
    assert verify_signature(bundle, Trust.of([public])).signer == "key.pub"


def test_the_librarys_own_command_verifies_what_we_sign(signed: Path, pair: KeyPair) -> None:
    from model_signing import verifying

    verifying.Config().use_elliptic_key_verifier(public_key=pair.public).verify(signed, signed / "model.sig")


# Certificates


def test_a_certificate_of_a_trusted_authority_holds(bundle: Path, tmp_path: Path) -> None:
    authority = make_authority(tmp_path)
    own, certificate = make_certificate(tmp_path, authority)
    sign(bundle, own.private, certificate=Certificate(certificate))
    assert verify_signature(bundle, Trust.of([authority.file])).signer == "CN=signer"


def test_a_chain_of_authorities_holds_up_to_the_trusted_one(bundle: Path, tmp_path: Path) -> None:
    root = make_authority(tmp_path, "root")
    between = make_authority(tmp_path, "between", above=root)
    own, certificate = make_certificate(tmp_path, between)
    sign(bundle, own.private, certificate=Certificate(certificate, (between.file,)))
    assert verify_signature(bundle, Trust.of([root.file])).signer == "CN=signer"
    with pytest.raises(VerificationFailed, match="no trusted authority"):
        verify_signature(bundle, Trust.of([make_authority(tmp_path, "stranger").file]))


@pytest.mark.parametrize(
    ("authority_days", "days", "said"),
    [
        ((-400, 400), (-30, -1), "expired on"),
        ((-400, 400), (1, 30), "valid from"),
        ((-400, -1), (-30, 30), "expired on"),
    ],
    ids=["expired", "not-yet", "authority-expired"],
)
def test_a_certificate_out_of_its_time_is_refused(
    bundle: Path, tmp_path: Path, authority_days: tuple[int, int], days: tuple[int, int], said: str
) -> None:
    authority = make_authority(tmp_path, days=authority_days)
    own, certificate = make_certificate(tmp_path, authority, days=days)
    with at_day(sum(days) / 2):
        sign(bundle, own.private, certificate=Certificate(certificate))
    assert said in sentence(amoeba("bundle", "verify", bundle, "--public-key", authority.file, "--quiet"), 5)


def test_a_certificate_of_another_key_does_not_sign(bundle: Path, pair: KeyPair, tmp_path: Path) -> None:
    _, certificate = make_certificate(tmp_path, make_authority(tmp_path))
    with pytest.raises(BadInput, match="does not match") as found:
        sign(bundle, pair.private, certificate=Certificate(certificate))
    assert "openssl" not in str(found.value)
    assert not (bundle / "release.json").exists()


@pytest.mark.parametrize(("days", "said"), [((-30, -1), "expired on"), ((1, 30), "is valid from")])
def test_a_certificate_out_of_its_time_does_not_sign(
    bundle: Path, tmp_path: Path, days: tuple[int, int], said: str
) -> None:
    own, certificate = make_certificate(tmp_path, make_authority(tmp_path), days=days)
    command = ("bundle", "sign", bundle, "--private-key", own.private, "--certificate", certificate)
    assert said in sentence(amoeba(*command), 2)
    assert not (bundle / "release.json").exists()


def test_an_authority_out_of_its_time_does_not_go_along(bundle: Path, tmp_path: Path) -> None:
    authority = make_authority(tmp_path, days=(-400, -1))
    own, certificate = make_certificate(tmp_path, authority)
    with pytest.raises(BadInput, match="'CN=authority' expired on"):
        sign(bundle, own.private, certificate=Certificate(certificate, (authority.file,)))


def test_a_certificate_that_is_not_for_signing_does_not_sign(bundle: Path, tmp_path: Path) -> None:
    authority = make_authority(tmp_path)
    own, certificate = make_certificate(tmp_path, authority, signs=False, extended=ExtendedKeyUsageOID.SERVER_AUTH)
    with pytest.raises(BadInput, match="'CN=signer' is not meant for signing"):
        sign(bundle, own.private, certificate=Certificate(certificate))
    own, certificate = make_certificate(tmp_path, authority, signs=False, extended=ExtendedKeyUsageOID.CODE_SIGNING)
    sign(bundle, own.private, certificate=Certificate(certificate))
    verify_signature(bundle, Trust.of([authority.file]))


def test_a_chain_out_of_order_does_not_sign(bundle: Path, tmp_path: Path) -> None:
    root = make_authority(tmp_path, "root")
    between = make_authority(tmp_path, "between", above=root)
    own, certificate = make_certificate(tmp_path, between)
    with pytest.raises(BadInput, match="was not issued by 'CN=root'"):
        sign(bundle, own.private, certificate=Certificate(certificate, (root.file, between.file)))


def test_a_certificate_below_one_that_is_no_authority_does_not_sign(bundle: Path, tmp_path: Path) -> None:
    pair, file = make_certificate(tmp_path, make_authority(tmp_path), "no-authority")
    key = serialization.load_pem_private_key(pair.private.read_bytes(), None)
    assert isinstance(key, ec.EllipticCurvePrivateKey)
    below = Authority(file, x509.load_pem_x509_certificate(file.read_bytes()), key)
    own, certificate = make_certificate(tmp_path, below)
    with pytest.raises(BadInput, match="was not issued by 'CN=no-authority' as an authority"):
        sign(bundle, own.private, certificate=Certificate(certificate, (file,)))


def test_signing_says_until_when_and_whom_devices_must_trust(bundle: Path, tmp_path: Path) -> None:
    root = make_authority(tmp_path, "root")
    between = make_authority(tmp_path, "between", above=root, days=(-10, 20))
    own, certificate = make_certificate(tmp_path, between)
    command = ("bundle", "sign", bundle, "--private-key", own.private, "--certificate", certificate)
    done = amoeba(*command)
    assert done.exit_code == 0, done.output
    assert "devices must trust the certificate of 'CN=between'" in done.stderr
    day = datetime.datetime.now(datetime.UTC) + datetime.timedelta(days=30)
    assert done.stdout.endswith(f"by a certificate valid until {day:%Y-%m-%d}\n")
    done = amoeba(*command, "--chain", between.file)
    assert "devices must trust the certificate of 'CN=root'" in done.stderr
    done = amoeba(*command, "--chain", between.file, "--chain", root.file, "--json")
    assert "must trust" not in done.stderr
    until = json.loads(done.stdout)["valid_until"]
    assert until.startswith(f"{day - datetime.timedelta(days=10):%Y-%m-%d}")


def test_an_encrypted_key_with_a_certificate(bundle: Path, tmp_path: Path) -> None:
    _, certificate = make_certificate(tmp_path, make_authority(tmp_path))
    own = make_key(tmp_path, "locked", password=b"open sesame")
    command = ("bundle", "sign", bundle, "--private-key", own.private, "--certificate", certificate)
    said = sentence(amoeba(*command, AMOEBA_KEY_PASSWORD="open sesame"), 2)
    assert "cannot be encrypted; decrypt it with" in said


def test_a_key_alone_is_no_stand_in_for_its_certificate(bundle: Path, tmp_path: Path) -> None:
    own, certificate = make_certificate(tmp_path, make_authority(tmp_path))
    sign(bundle, own.private, certificate=Certificate(certificate))
    with pytest.raises(VerificationFailed, match="no trusted authority"):
        verify_signature(bundle, Trust.of([own.public]))


def test_any_flipped_byte_of_a_chain_is_refused(bundle: Path, tmp_path: Path) -> None:
    root = make_authority(tmp_path, "root")
    between = make_authority(tmp_path, "between", above=root)
    own, certificate = make_certificate(tmp_path, between)
    sign(bundle, own.private, certificate=Certificate(certificate, (between.file, root.file)))
    trust, file = Trust.of([root.file]), bundle / "model.sig"
    whole = file.read_bytes()
    places = random.Random(0).sample(range(len(whole)), FLIPS)
    for place in places:
        file.write_bytes(whole[:place] + bytes([whole[place] ^ 1]) + whole[place + 1 :])
        with pytest.raises(VerificationFailed):
            verify_signature(bundle, trust)
    file.write_bytes(whole)
    verify_signature(bundle, trust)


def test_the_documents_own_authority_signs_for_devices(
    bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every line of the example is run as it stands there."""
    text = (Path(__file__).parent.parent / "docs" / "registry.md").read_text(encoding="utf-8")
    (example,) = re.findall(r"```sh\n(.*?)```", text.partition("## Keys and certificates")[2], re.DOTALL)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "out").mkdir()
    shutil.copytree(bundle, tmp_path / "out", dirs_exist_ok=True)
    shell, ours = example.split("# Then")
    done = subprocess.run(["sh", "-ec", shell], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    commands = [line.partition("#")[0].split() for line in ours.splitlines() if line.startswith("amoeba ")]
    assert [command[2] for command in commands] == ["sign", "verify"]
    for _, *command in commands:
        result = amoeba(*command, "--quiet")
        assert result.exit_code == 0, result.output
    assert "signed by CN=releases" in result.output
    assert verify_signature(tmp_path / "out", Trust.of_folder(tmp_path / "trust")).signer == "CN=releases"
    end = x509.load_pem_x509_certificate((tmp_path / "signer.crt").read_bytes()).not_valid_after_utc
    assert end > datetime.datetime.now(datetime.UTC) + datetime.timedelta(days=300)


# What does not hold


def test_any_flipped_byte_is_refused(signed: Path, pair: KeyPair) -> None:
    trust, chance = Trust.of([pair.public]), random.Random(1)
    files = sorted(path for path in signed.rglob("*") if path.is_file())
    for flip in range(FLIPS):
        file = files[flip % len(files)]
        whole = bytearray(file.read_bytes())
        place, bit = chance.randrange(len(whole)), 1 << chance.randrange(8)
        whole[place] ^= bit
        file.write_bytes(whole)
        with pytest.raises(VerificationFailed):
            verify_signature(signed, trust)
        whole[place] ^= bit
        file.write_bytes(whole)
    verify_signature(signed, trust)


def _append(folder: Path) -> None:
    (folder / "engine" / "extra.bin").write_bytes(b"more")


def _append_hidden(folder: Path) -> None:
    (folder / ".git").mkdir()
    (folder / ".git" / "config").write_bytes(b"more")


def _remove(folder: Path) -> None:
    (folder / "tokenizer.json").unlink()


def _remove_unlisted(folder: Path) -> None:
    (folder / "measured.json").unlink()


def _remove_release(folder: Path) -> None:
    (folder / "release.json").unlink()


def _link(folder: Path) -> None:
    file = folder / "config.json"
    file.rename(folder.parent / "config.json")
    file.symlink_to(folder.parent / "config.json")


def _truncate(folder: Path) -> None:
    file = folder / "tokenizer.json"
    file.write_bytes(file.read_bytes()[:-1])


def _newer_release(folder: Path) -> None:
    value = json.loads((folder / "release.json").read_text())
    (folder / "release.json").write_text(json.dumps(value | {"serial": 99}))


def _unsign(folder: Path) -> None:
    (folder / "model.sig").unlink()


def _empty(folder: Path) -> None:
    (folder / "model.sig").write_bytes(b"")


def _no_json(folder: Path) -> None:
    (folder / "model.sig").write_bytes(b"[" * 100_000)


def _huge(folder: Path) -> None:
    with (folder / "model.sig").open("r+b") as file:
        file.truncate(100 * 2**20)


def _spaced(folder: Path) -> None:
    file = folder / "model.sig"
    file.write_text(json.dumps(json.loads(file.read_text()), indent=1))


CHANGES: list[Callable[[Path], None]] = [
    *(_append, _append_hidden, _remove, _remove_unlisted, _remove_release, _link, _truncate, _newer_release),
    *(_unsign, _empty, _no_json, _huge, _spaced),
]


@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.__name__.strip("_"))
def test_a_changed_bundle_is_refused(signed: Path, pair: KeyPair, change: Callable[[Path], None]) -> None:
    change(signed)
    assert sentence(amoeba("bundle", "verify", signed, "--public-key", pair.public, "--quiet"), 5)


def test_a_link_is_refused_in_our_own_words(signed: Path, pair: KeyPair) -> None:
    _link(signed)
    said = sentence(amoeba("bundle", "verify", signed, "--public-key", pair.public, "--quiet"), 5)
    assert "config.json: is a link, which a bundle does not hold" in said
    assert "symlink" not in said


def test_the_serial_is_shown_without_a_key_too(signed: Path) -> None:
    found = json.loads(amoeba("bundle", "verify", signed, "--json", "--quiet").stdout)
    assert (found["serial"], found["signer"]) == (7, None)
    assert "release 7, its signature was not checked" in amoeba("bundle", "verify", signed, "--quiet").stdout


def test_a_wrong_key_is_refused(signed: Path, tmp_path: Path) -> None:
    other = make_key(tmp_path, "other").public
    said = sentence(amoeba("bundle", "verify", signed, "--public-key", other, "--quiet"), 5)
    assert "signed by none of the trusted keys" in said


def test_a_signature_of_another_bundle_is_refused(signed: Path, built: Path, pair: KeyPair, tmp_path: Path) -> None:
    other = Path(shutil.copytree(built, tmp_path / "other"))
    (other / "measured.json").write_text("{}")
    sign(other, pair.private)
    shutil.copyfile(other / "model.sig", signed / "model.sig")
    with pytest.raises(VerificationFailed, match="not what was signed"):
        verify_signature(signed, Trust.of([pair.public]))


def test_a_key_hint_alone_proves_nothing(signed: Path, pair: KeyPair, tmp_path: Path) -> None:
    """A signature by another key that names the trusted one."""
    hint = json.loads((signed / "model.sig").read_text())["verificationMaterial"]["publicKey"]["hint"]
    sign(signed, make_key(tmp_path, "other").private)
    value = json.loads((signed / "model.sig").read_text())
    value["verificationMaterial"]["publicKey"]["hint"] = hint
    (signed / "model.sig").write_text(json.dumps(value, separators=(",", ":")))
    with pytest.raises(VerificationFailed, match="does not hold"):
        verify_signature(signed, Trust.of([pair.public]))


def test_a_broken_bundle_is_not_signed(bundle: Path, pair: KeyPair) -> None:
    (bundle / "config.json").write_text("{}")
    assert "config.json" in sentence(amoeba("bundle", "sign", bundle, "--private-key", pair.private), 5)
    assert not (bundle / "model.sig").exists() and not (bundle / "release.json").exists()


def test_keys_that_cannot_sign_are_refused(bundle: Path, pair: KeyPair, tmp_path: Path) -> None:
    damaged = tmp_path / "damaged.key"
    damaged.write_text(pair.private.read_text()[:100])
    other_curve = make_key(tmp_path, "other", curve=ec.SECP256K1).private
    secrets: dict[str, Any] = {"rsa": rsa.generate_private_key(65537, 2048), "ed": ed25519.Ed25519PrivateKey.generate()}
    for name, secret in secrets.items():
        form = (serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
        (tmp_path / f"{name}.key").write_bytes(secret.private_bytes(serialization.Encoding.PEM, *form))
    for key, said in (
        (damaged, "is damaged or no key that signs"),
        (other_curve, "is a key of the curve secp256k1; signing takes one of P-256, P-384, P-521: make one with"),
        (tmp_path / "rsa.key", "is an RSA key; signing takes an elliptic-curve key (P-256, P-384, P-521): make one"),
        (tmp_path / "ed.key", "is an Ed25519 key; signing takes"),
        (pair.public, "holds no private key in PEM"),
        (tmp_path / "missing.key", "is no file"),
        (tmp_path, "is no file"),
    ):
        assert f"{key}: {said}" in sentence(amoeba("bundle", "sign", bundle, "--private-key", key), 2)
    assert not (bundle / "release.json").exists()


def test_files_that_are_no_keys_are_refused(signed: Path, pair: KeyPair, tmp_path: Path) -> None:
    empty, damaged = tmp_path / "empty", tmp_path / "damaged.pub"
    empty.mkdir()
    damaged.write_text(pair.public.read_text().replace("M", "N", 5))
    for key in (pair.private, tmp_path / "missing.pub", signed / "config.json", damaged, empty):
        assert str(key) in sentence(amoeba("bundle", "verify", signed, "--public-key", key, "--quiet"), 2)


def test_finishing_a_bundle_takes_its_signature_away(signed: Path) -> None:
    from amoeba_deploy.bundle import read_manifest, write_manifest

    facts = {key: value for key, value in read_manifest(signed).items() if key not in ("format", "files")}
    write_manifest(signed, facts | {"settings": {}})
    assert not (signed / "model.sig").exists() and not (signed / "release.json").exists()


# Provenance


def provenance(folder: Path) -> dict[str, Any]:
    value: dict[str, Any] = json.loads((folder / "provenance.json").read_text())
    return value


def test_the_provenance_is_an_in_toto_statement_with_slsas_predicate(built: Path) -> None:
    value = provenance(built)
    statement = Statement.copy_from_pb(_parsed(value))
    statement.validate()
    assert value["predicateType"] == "https://slsa.dev/provenance/v1"
    assert set(value["predicate"]) == {"buildDefinition", "runDetails"}
    assert set(value["predicate"]["buildDefinition"]) == {
        *("buildType", "externalParameters", "internalParameters", "resolvedDependencies"),
    }


def _parsed(value: dict[str, Any]) -> Any:
    import in_toto_attestation.v1.statement_pb2 as spb
    from google.protobuf.json_format import ParseDict

    return ParseDict(value, spb.Statement())


def test_the_provenance_names_what_the_bundle_was_built_from(built: Path) -> None:
    manifest = json.loads((built / "manifest.json").read_text())
    definition = provenance(built)["predicate"]["buildDefinition"]
    digests = {
        entry["name"]: entry["digest"]["sha256"] for entry in definition["resolvedDependencies"] if "digest" in entry
    }
    assert digests["checkpoint"] == manifest["checkpoint_digest"].removeprefix("sha256:")
    assert digests["base model"] == manifest["base_digest"].removeprefix("sha256:")
    uris = {entry["uri"] for entry in definition["resolvedDependencies"] if "uri" in entry}
    assert f"pkg:pypi/onnxruntime@{manifest['engine_versions']['onnxruntime']}" in uris
    assert definition["externalParameters"]["shape"] == manifest["shape"]


def test_a_provenance_of_another_manifest_is_refused(bundle: Path) -> None:
    value = provenance(bundle)
    value["subject"][0]["digest"]["sha256"] = "0" * 64
    (bundle / "provenance.json").write_text(json.dumps(value))
    assert "speaks of another bundle" in sentence(amoeba("bundle", "verify", bundle, "--quiet"), 5)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (_append, "is not what was signed: engine/extra.bin is added;"),
        (_remove, "is not what was signed: tokenizer.json is missing;"),
        (_truncate, "is not what was signed: tokenizer.json is changed;"),
    ],
    ids=["added", "missing", "changed"],
)
def test_the_file_that_is_not_as_it_was_signed_is_named(
    signed: Path, pair: KeyPair, change: Callable[[Path], None], said: str
) -> None:
    change(signed)
    with pytest.raises(VerificationFailed, match=said):
        verify_signature(signed, Trust.of([pair.public]))
