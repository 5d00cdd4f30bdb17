"""Archives of bundles: the same bytes every time, and nothing that is hostile or damaged is unpacked."""

from __future__ import annotations

import hashlib
import io
import json
import os
import random
import shutil
import subprocess
import tarfile
import tracemalloc
from collections.abc import Callable
from pathlib import Path

import pytest
import zstandard
from conftest import amoeba, sentence
from hypothesis import given, settings
from hypothesis import strategies as st
from registries import WEIGHTS, contents, noise, small_bundle

from amoeba_deploy.delivery.archive import pack, unpack
from amoeba_deploy.errors import AmoebaError, BadInput

MIB = 1 << 20


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small bundle that no test changes."""
    return small_bundle(tmp_path_factory.mktemp("made") / "bundle")


@pytest.fixture(scope="module")
def archive(bundle: Path) -> Path:
    """The bundle's archive."""
    file = bundle.parent / "bundle.tar.zst"
    pack(bundle, file)
    return file


def compressed(data: bytes, **options: object) -> bytes:
    """One zstd frame as ``pack`` writes it, or with other settings."""
    return zstandard.ZstdCompressor(**({"level": 3, "write_checksum": True} | options)).compress(data)  # type: ignore[arg-type]


def entry(name: str, data: bytes = b"", kind: bytes = tarfile.REGTYPE, **more: object) -> tuple[tarfile.TarInfo, bytes]:
    """An entry of a tar archive; ``more`` are attributes of its header."""
    info = tarfile.TarInfo(name)
    info.type, info.size = kind, len(data)
    for key, value in more.items():
        setattr(info, key, value)
    return info, data


def hostile(file: Path, bundle: Path, *entries: tuple[tarfile.TarInfo, bytes]) -> Path:
    """A bundle's archive with more entries."""
    raw = io.BytesIO()
    with tarfile.open(fileobj=raw, mode="w", format=tarfile.PAX_FORMAT) as made:
        for name, data in contents(bundle).items():
            info, _ = entry(name, data)
            made.addfile(info, io.BytesIO(data))
        for info, data in entries:
            made.addfile(info, io.BytesIO(data))
    file.write_bytes(compressed(raw.getvalue()))
    return file


def refused(file: Path, tmp_path: Path, code: int = 2) -> str:
    """The sentence of unpacking an archive into a folder's folder; nothing is left there, or anywhere around."""
    place = tmp_path / "place" / "deep"
    place.mkdir(parents=True, exist_ok=True)
    before = sorted(tmp_path.rglob("*"))
    said = sentence(amoeba("bundle", "unpack", file, "-o", place / "out", "--quiet"), code)
    assert sorted(tmp_path.rglob("*")) == before
    return said


# What is packed is what is unpacked


def test_what_was_packed_is_unpacked_byte_for_byte(bundle: Path, tmp_path: Path) -> None:
    packed = amoeba("bundle", "pack", bundle, "-o", tmp_path / "x.tar.zst", "--json")
    assert packed.exit_code == 0, packed.output
    value = json.loads(packed.stdout)
    data = (tmp_path / "x.tar.zst").read_bytes()
    assert value["digest"] == f"sha256:{hashlib.sha256(data).hexdigest()}"
    assert value["packed_bytes"] == len(data)
    assert value["bytes"] == sum(map(len, contents(bundle).values()))
    unpacked = amoeba("bundle", "unpack", tmp_path / "x.tar.zst", "-o", tmp_path / "out", "--json")
    assert unpacked.exit_code == 0, unpacked.output
    assert json.loads(unpacked.stdout) == {"path": str(tmp_path / "out"), "files": 7, "bytes": value["bytes"]}
    assert contents(tmp_path / "out") == contents(bundle)


def test_what_is_done_is_said(bundle: Path, tmp_path: Path) -> None:
    packed = amoeba("bundle", "pack", bundle, "-o", tmp_path / "x.tar.zst")
    assert f"{tmp_path / 'x.tar.zst'}: 7 files, 0.4 MB packed into 0.4 MB\nsha256:" in packed.stdout
    unpacked = amoeba("bundle", "unpack", tmp_path / "x.tar.zst", "-o", tmp_path / "out")
    assert unpacked.stdout == f"{tmp_path / 'out'}: 7 files, 0.4 MB\n"


def test_the_same_bundle_gives_the_same_bytes(bundle: Path, archive: Path, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(bundle, tmp_path / "elsewhere" / "other-name"))
    for file in copy.rglob("*"):
        os.utime(file, (1, 1))
        file.chmod(0o700)
    pack(copy, tmp_path / "again.tar.zst")
    assert (tmp_path / "again.tar.zst").read_bytes() == archive.read_bytes()


def test_nothing_of_this_machine_is_in_an_archive(archive: Path) -> None:
    data = zstandard.ZstdDecompressor().decompressobj().decompress(archive.read_bytes())
    with tarfile.open(fileobj=io.BytesIO(data)) as opened:
        entries = opened.getmembers()
    assert [each.name for each in entries] == sorted(each.name for each in entries)
    facts = {(each.mtime, each.uid, each.gid, each.uname, each.gname, each.mode, each.type) for each in entries}
    assert facts == {(0, 0, 0, "", "", 0o644, tarfile.REGTYPE)}


@pytest.mark.skipif(not shutil.which("zstd") or not shutil.which("tar"), reason="no zstd or no tar is here")
def test_other_tools_read_an_archive_and_write_one(bundle: Path, archive: Path, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    subprocess.run(["tar", "--zstd", "-xf", archive, "-C", tmp_path / "out"], check=True)
    assert contents(tmp_path / "out") == contents(bundle)
    subprocess.run(
        ["tar", "--zstd", "-cf", tmp_path / "own.tar.zst", "-C", bundle, "engine", "manifest.json"]
        + ["tokenizer.json", "README.md", "empty.txt", "measured.json", "provenance.json"],
        check=True,
    )
    unpack(tmp_path / "own.tar.zst", tmp_path / "own")
    assert contents(tmp_path / "own") == contents(bundle)


def test_long_names_are_kept(tmp_path: Path) -> None:
    name = "x" * 200 + "-ä.bin"
    made = small_bundle(tmp_path / "bundle", **{name: b"long"})
    pack(made, tmp_path / "x.tar.zst")
    unpack(tmp_path / "x.tar.zst", tmp_path / "out")
    assert (tmp_path / "out" / name).read_bytes() == b"long"


def test_neither_packing_nor_unpacking_needs_the_memory_of_a_file(tmp_path: Path) -> None:
    made = small_bundle(tmp_path / "bundle", 48 * MIB)
    tracemalloc.start()
    pack(made, tmp_path / "x.tar.zst")
    unpack(tmp_path / "x.tar.zst", tmp_path / "out")
    _, most = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert most < 16 * MIB
    assert (tmp_path / "out" / WEIGHTS).read_bytes() == (made / WEIGHTS).read_bytes()


def test_an_output_that_is_there_is_replaced_only_with_force(bundle: Path, archive: Path, tmp_path: Path) -> None:
    file, out = tmp_path / "x.tar.zst", tmp_path / "out"
    file.write_bytes(b"mine")
    assert "exists already" in sentence(amoeba("bundle", "pack", bundle, "-o", file, "--quiet"), 2)
    assert file.read_bytes() == b"mine"
    assert amoeba("bundle", "pack", bundle, "-o", file, "--force", "--quiet").exit_code == 0
    unpack(file, out)
    assert "exists already" in sentence(amoeba("bundle", "unpack", file, "-o", out, "--quiet"), 2)
    assert amoeba("bundle", "unpack", archive, "-o", out, "--force", "--quiet").exit_code == 0
    assert contents(out) == contents(bundle)


def test_a_broken_bundle_is_not_packed(bundle: Path, tmp_path: Path) -> None:
    broken = Path(shutil.copytree(bundle, tmp_path / "broken"))
    (broken / WEIGHTS).write_bytes(noise(300_000, 5))
    sentence(amoeba("bundle", "pack", broken, "-o", tmp_path / "x.tar.zst", "--quiet"), 5)
    (broken / "link").symlink_to("/etc/hostname")
    sentence(amoeba("bundle", "pack", broken, "-o", tmp_path / "x.tar.zst", "--quiet"), 5)
    assert [path.name for path in tmp_path.iterdir()] == ["broken"]


# What is hostile


@pytest.mark.parametrize(
    ("made", "said"),
    [
        (entry("../evil", b"x"), "leaves its folder"),
        (entry("a/../../evil", b"x"), "leaves its folder"),
        (entry("/tmp/evil", b"x"), "absolute"),
        (entry("C:/evil", b"x"), "absolute"),
        (entry("a\\..\\evil", b"x"), "backslash"),
        (entry("./a", b"x"), "empty parts"),
        (entry("a//b", b"x"), "empty parts"),
        (entry("a\nb", b"x"), "control characters"),
        (entry("../folder", kind=tarfile.DIRTYPE), "leaves its folder"),
        (entry("link", kind=tarfile.SYMTYPE, linkname="/etc/passwd"), "is no plain file"),
        (entry("link", kind=tarfile.SYMTYPE, linkname="manifest.json"), "is no plain file"),
        (entry("hard", kind=tarfile.LNKTYPE, linkname="manifest.json"), "is no plain file"),
        (entry("hard", kind=tarfile.LNKTYPE, linkname="/etc/passwd"), "is no plain file"),
        (entry("null", kind=tarfile.CHRTYPE, devmajor=1, devminor=3), "is no plain file"),
        (entry("disk", kind=tarfile.BLKTYPE), "is no plain file"),
        (entry("pipe", kind=tarfile.FIFOTYPE), "is no plain file"),
        (entry("contiguous", kind=tarfile.CONTTYPE), "is no plain file"),
        (entry("sparse", b"x", kind=tarfile.GNUTYPE_SPARSE), "is no plain file"),
        (entry("odd", b"x", kind=b"Z"), "is no plain file"),
        (entry("sparse", b"x", pax_headers={"GNU.sparse.map": "0,1", "GNU.sparse.size": "1"}), "is no plain file"),
        (entry("README.md", b"x"), "which are one file"),
        (entry("readme.MD", b"x"), "which are one file"),
        (entry("README.md/inside", b"x"), "which is a file"),
        (entry("README.md", kind=tarfile.DIRTYPE), "which is a file and a folder"),
        (entry("Engine", b"x"), "which is a file and a folder"),
        (entry("x" * 300, b"x"), "too long"),
    ],
)
def test_a_hostile_entry_is_refused(
    bundle: Path, tmp_path: Path, made: tuple[tarfile.TarInfo, bytes], said: str
) -> None:
    assert said in refused(hostile(tmp_path / "x.tar.zst", bundle, made), tmp_path)


def test_a_file_below_a_link_is_refused_with_the_link(bundle: Path, tmp_path: Path) -> None:
    (tmp_path / "victim").mkdir()
    through = entry("way", kind=tarfile.SYMTYPE, linkname=str(tmp_path / "victim")), entry("way/evil", b"x")
    assert "is no plain file" in refused(hostile(tmp_path / "x.tar.zst", bundle, *through), tmp_path)


def test_more_entries_than_any_bundle_has_are_refused(
    bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("amoeba_deploy.delivery.paths.MAX_FILES", 100)
    for kind in (tarfile.REGTYPE, tarfile.DIRTYPE):
        many = [entry(f"f{index}", kind=kind) for index in range(101)]
        assert "more than 100 files" in refused(hostile(tmp_path / "x.tar.zst", bundle, *many), tmp_path)


def test_a_file_that_the_manifest_does_not_list_is_refused(bundle: Path, tmp_path: Path) -> None:
    said = refused(hostile(tmp_path / "x.tar.zst", bundle, entry("more", b"x")), tmp_path, 5)
    assert "x.tar.zst: the file more is not in its manifest" in said


def test_a_file_that_was_changed_is_refused(bundle: Path, tmp_path: Path) -> None:
    changed = Path(shutil.copytree(bundle, tmp_path / "changed"))
    (changed / WEIGHTS).write_bytes(noise(300_000, 5))
    said = refused(hostile(tmp_path / "x.tar.zst", changed), tmp_path, 5)
    assert f"x.tar.zst/{WEIGHTS}: differs from what its manifest lists" in said


# What is too much


def test_a_file_that_says_it_is_larger_than_the_disk_is_not_begun(tmp_path: Path) -> None:
    header = entry("bomb", size=8 << 40)[0].tobuf(tarfile.GNU_FORMAT)
    (tmp_path / "x.tar.zst").write_bytes(compressed(header + bytes(1024)))
    assert "8796093 MB, and " in refused(tmp_path / "x.tar.zst", tmp_path)
    header = entry("bomb", size=1 << 60)[0].tobuf(tarfile.GNU_FORMAT)
    (tmp_path / "x.tar.zst").write_bytes(compressed(header + bytes(1024)))
    assert "has an impossible size" in refused(tmp_path / "x.tar.zst", tmp_path)


def test_zeros_that_fill_a_disk_are_stopped_before(
    bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bomb = hostile(tmp_path / "x.tar.zst", bundle, entry("zeros", bytes(64 * MIB)))
    assert bomb.stat().st_size < MIB
    free = shutil.disk_usage(tmp_path)._replace(free=32 * MIB)
    monkeypatch.setattr("shutil.disk_usage", lambda _: free)
    assert "'zeros' has 67 MB, and 34 MB are free" in refused(bomb, tmp_path)


@pytest.mark.parametrize("kind", [tarfile.XHDTYPE, tarfile.XGLTYPE, tarfile.GNUTYPE_LONGNAME, tarfile.GNUTYPE_LONGLINK])
def test_a_header_that_would_fill_the_memory_is_not_read(tmp_path: Path, kind: bytes) -> None:
    header = entry("header", kind=kind, size=1 << 30)[0].tobuf(tarfile.GNU_FORMAT)
    writer = zstandard.ZstdCompressor(level=3, write_checksum=True).compressobj()
    parts = [writer.compress(header), *(writer.compress(bytes(MIB)) for _ in range(256)), writer.flush()]
    (tmp_path / "x.tar.zst").write_bytes(b"".join(parts))
    tracemalloc.start()
    assert "a header of it is too large" in refused(tmp_path / "x.tar.zst", tmp_path)
    assert tracemalloc.get_traced_memory()[1] < 16 * MIB
    tracemalloc.stop()


def test_headers_of_headers_without_end_are_refused(tmp_path: Path) -> None:
    header = entry("h", kind=tarfile.XHDTYPE)[0].tobuf(tarfile.GNU_FORMAT)
    (tmp_path / "x.tar.zst").write_bytes(compressed(header * 5000))
    assert "is damaged or no archive of a bundle" in refused(tmp_path / "x.tar.zst", tmp_path)


def test_what_goes_on_after_the_last_entry_is_refused(archive: Path, tmp_path: Path) -> None:
    data = zstandard.ZstdDecompressor().decompressobj().decompress(archive.read_bytes())
    for more in (b"x", bytes(64 * MIB), data):
        (tmp_path / "x.tar.zst").write_bytes(compressed(data + more))
        assert "something follows its last entry" in refused(tmp_path / "x.tar.zst", tmp_path)


def test_a_window_that_needs_much_memory_is_refused(archive: Path, tmp_path: Path) -> None:
    data = zstandard.ZstdDecompressor().decompressobj().decompress(archive.read_bytes())
    wide = zstandard.ZstdCompressionParameters(window_log=27)
    writer = zstandard.ZstdCompressor(compression_params=wide).compressobj()
    (tmp_path / "x.tar.zst").write_bytes(writer.compress(data) + writer.flush())
    assert "needs 128 MB of memory to unpack where 8 are allowed" in refused(tmp_path / "x.tar.zst", tmp_path)


# What is damaged


@pytest.mark.parametrize("size", [0, 1, 3, 4, 5, 8, 9, 12, 100, 200_000, -10_000, -5, -4, -3, -1])
def test_a_truncated_archive_is_refused(archive: Path, tmp_path: Path, size: int) -> None:
    (tmp_path / "x.tar.zst").write_bytes(archive.read_bytes()[:size])
    said = refused(tmp_path / "x.tar.zst", tmp_path)
    assert "is truncated" in said or "is no zstd archive" in said or "header is damaged" in said


def skippable(size: int) -> bytes:
    """A frame that zstd tools skip."""
    return b"\x50\x2a\x4d\x18" + size.to_bytes(4, "little") + bytes(size)


@pytest.mark.parametrize(
    "more",
    [b"\0", b"x", b"\x28", b"\x28\xb5\x2f\xfd", compressed(b""), compressed(b"x" * 100), skippable(0), skippable(9)],
)
def test_what_follows_an_archive_is_refused(archive: Path, tmp_path: Path, more: bytes) -> None:
    (tmp_path / "x.tar.zst").write_bytes(archive.read_bytes() + more)
    assert "goes on after its end" in refused(tmp_path / "x.tar.zst", tmp_path)


@pytest.mark.parametrize(
    "make",
    [
        lambda _: b"",
        lambda data: data,
        lambda data: b"\x1f\x8b" + data,
        lambda data: skippable(8) + compressed(data),
        lambda _: compressed(b""),
        lambda _: compressed(b"x" * 1000),
        lambda _: compressed(bytes(10_240)),
        lambda _: compressed(random.Random(0).randbytes(5000)),
    ],
)
def test_what_is_no_archive_is_refused(archive: Path, tmp_path: Path, make: Callable[[bytes], bytes]) -> None:
    data = zstandard.ZstdDecompressor().decompressobj().decompress(archive.read_bytes())
    (tmp_path / "x.tar.zst").write_bytes(make(data))
    refused(tmp_path / "x.tar.zst", tmp_path)


def test_what_is_not_there_is_refused(tmp_path: Path) -> None:
    assert "is no file" in refused(tmp_path / "missing.tar.zst", tmp_path)
    assert "is no file" in refused(tmp_path, tmp_path)


def test_without_zstandard_it_is_said_how_to_get_it(
    bundle: Path, archive: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(__import__("sys").modules, "zstandard", None)
    for command in (("pack", bundle, "-o", tmp_path / "x"), ("unpack", archive, "-o", tmp_path / "y")):
        assert "pip install 'amoeba-deploy[deliver]'" in sentence(amoeba("bundle", *command, "--quiet"), 6)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, bytes, bytes]:
    """A tiny bundle, its archive's bytes, and those of the tar archive in it."""
    root = tmp_path_factory.mktemp("tiny")
    made = small_bundle(root / "bundle", 40)
    (made / "tokenizer.json").unlink()
    manifest = json.loads((made / "manifest.json").read_text())
    del manifest["files"]["tokenizer.json"]
    (made / "manifest.json").write_text(json.dumps(manifest))
    pack(made, root / "x.tar.zst")
    data = (root / "x.tar.zst").read_bytes()
    return made, data, zstandard.ZstdDecompressor().decompressobj().decompress(data)


@settings(max_examples=150)
@given(st.data())
def test_any_damage_is_refused_or_harmless(
    tiny: tuple[Path, bytes, bytes], tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    made, packed, plain = tiny
    inside = data.draw(st.booleans())
    spoiled = bytearray(plain if inside else packed)
    for _ in range(data.draw(st.integers(1, 4))):
        spoiled[data.draw(st.integers(0, len(spoiled) - 1))] = data.draw(st.integers(0, 255))
    root = tmp_path_factory.mktemp("damage")
    (root / "x.tar.zst").write_bytes(compressed(bytes(spoiled)) if inside else bytes(spoiled))
    try:
        unpack(root / "x.tar.zst", root / "out")
    except AmoebaError:
        assert [path.name for path in root.iterdir()] == ["x.tar.zst"]
    else:
        # Times and owners are not taken over, so damage to them does none; nor to files that no manifest lists.
        listed = json.loads((made / "manifest.json").read_text())["files"]
        found = contents(root / "out")
        assert {name: found[name] for name in listed} == {name: contents(made)[name] for name in listed}
    shutil.rmtree(root)


def test_an_archive_is_not_unpacked_over_what_it_lies_in(archive: Path, tmp_path: Path) -> None:
    unpack(archive, tmp_path / "out")
    inside = Path(shutil.copy(archive, tmp_path / "out" / "x.tar.zst"))
    with pytest.raises(BadInput, match="which this command needs"):
        unpack(inside, tmp_path / "out", force=True)
