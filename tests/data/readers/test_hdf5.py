from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from unittest import mock

import h5py
import numpy as np
import pytest
from fixtures import COUNTS, damage_chunk, truncate, write_challenge, write_pcam
from hdf5_files import edit, pcam_file, refused

from hf_histo.data.load import load
from hf_histo.data.readers import hdf5
from hf_histo.errors import HistoError


@pytest.mark.parametrize(
    ("member", "chunks"),
    [(member, chunks) for member in ("img", "metadata") for chunks in (None, True, "some")] + [("label", None)],
)
def test_refuses_what_was_never_written(tmp_path: Path, member: str, chunks: object) -> None:
    write_challenge(tmp_path)
    with h5py.File(tmp_path / "val.h5", "r+") as file:
        old = file[f"3/{member}"][()]
        del file[f"3/{member}"]
        sides = (1, *np.shape(old)[1:]) if chunks == "some" else chunks
        made = file["3"].create_dataset(member, np.shape(old), old.dtype, chunks=sides, fillvalue=1)
        if chunks == "some":
            made[:1] = old[:1]
    found = "2 of 3 chunks" if chunks == "some" else "(its values|1 of 1 chunks)"
    refused(tmp_path, rf"val\.h5: 3/{member}: {found} were never written, and would be read as 1, expected all of it")


@pytest.mark.parametrize("part", ["x", "y"])
def test_pcam_refuses_what_was_never_written(tmp_path: Path, part: str) -> None:
    write_pcam(tmp_path)
    with h5py.File(tmp_path / f"camelyonpatch_level_2_split_valid_{part}.h5", "r+") as file:
        old = file[part]
        shape, dtype = old.shape, old.dtype
        del file[part]
        file.create_dataset(part, shape, dtype, chunks=(1, *shape[1:]))[:2] = 1
    refused(tmp_path, rf"valid_{part}\.h5: {part}: 2 of 4 chunks were never written")


def test_refuses_what_is_declared_but_not_there(tmp_path: Path) -> None:
    write_challenge(tmp_path)
    edit(tmp_path, "val", "3/img", None)
    with h5py.File(tmp_path / "val.h5", "r+") as file:
        file.create_dataset("3/img", (3, 1_000_000, 1_000_000), "uint8", chunks=(3, 64, 64))
    refused(tmp_path, r"val\.h5: 3/img: uint8 of shape \(3, 1000000, 1000000\) .*, 0 bytes on disk")


def test_refuses_huge_metadata_before_reading(tmp_path: Path) -> None:
    write_challenge(tmp_path)
    edit(tmp_path, "val", "3/metadata", None)
    with h5py.File(tmp_path / "val.h5", "r+") as file:
        file.create_dataset("3/metadata", (10**12,), "int64", chunks=(64,))
    refused(tmp_path, r"val\.h5: 3/metadata: int64 of shape \(1000000000000,\) .*, 0 bytes on disk")


def test_refuses_a_billion_rows(tmp_path: Path) -> None:
    write_pcam(tmp_path)
    with h5py.File(pcam_file(tmp_path, "x.h5"), "w") as file:
        file.create_dataset("x", (10**9, 96, 96, 3), "uint8", chunks=(3, 96, 96, 3), compression="gzip")
    refused(tmp_path, r"valid_x\.h5: x: uint8 of shape \(1000000000, 96, 96, 3\) .*, 0 bytes on disk")


def test_refuses_a_chunk_that_unpacks_to_more_than_memory_holds(tmp_path: Path) -> None:
    write_challenge(tmp_path)
    edit(tmp_path, "val", "3/img", None)
    with h5py.File(tmp_path / "val.h5", "r+") as file:
        chunks = {"chunks": (1000, 1000, 1000), "maxshape": (None, None, None)}
        file.create_dataset("3/img", (3, 12, 14), "uint8", compression="gzip", **chunks)
    refused(tmp_path, r"val\.h5: 3/img: .* in chunks of 1000000000 bytes")


@pytest.mark.parametrize("name", ["../../etc/passwd", "..", "a\\b", "=1+1", "%n%s"])
def test_a_key_is_a_name_and_never_a_path(tmp_path: Path, name: str) -> None:
    data = tmp_path / "data"
    write_challenge(data)
    with h5py.File(data / "val.h5", "r+") as file:
        file.move("3", name.replace("/", "|"))
    content = (data / "val.h5").read_bytes()
    if "/" in name:  # what no library writes: the bytes of a name replaced in the file
        (data / "val.h5").write_bytes(content.replace(name.replace("/", "|").encode(), name.encode()))
        refused(data, r"val\.h5: \.\./\.\./etc/passwd: a path, expected a name without slashes")
    else:
        assert name in load(data, cache_dir=tmp_path / "cache")["val"]["id"]
    assert {path.name for path in tmp_path.iterdir()} <= {"data", "cache"}


@pytest.mark.parametrize(
    "link",
    [
        h5py.ExternalLink("other.h5", "/0"),
        h5py.ExternalLink("absent.h5", "/0"),
        h5py.SoftLink("/outside/0"),
        h5py.SoftLink("/nowhere"),
    ],
)
@pytest.mark.parametrize("key", ["3", "3/img", "3/label", "3/metadata"])
def test_refuses_links(tmp_path: Path, link: object, key: str) -> None:
    write_challenge(tmp_path)
    write_challenge(tmp_path / "other", counts={"train": 2})
    (tmp_path / "other/train.h5").replace(tmp_path / "other.h5")
    with h5py.File(tmp_path / "val.h5", "r+") as file:
        del file[key]
        file[key] = link
    refused(tmp_path, rf"val\.h5: {key}: a soft or external link")


def add_user_block(path: Path) -> None:
    """Copy a file with 512 bytes before what is HDF5's."""
    with h5py.File(path) as old, h5py.File(path.with_suffix(".new"), "w", userblock_size=512) as new:
        for key in old:
            old.copy(key, new)
    path.with_suffix(".new").replace(path)


@pytest.mark.parametrize("kind", ["user block", "compact", "chunked", "newest format", "big-endian"])
def test_every_way_of_storing_gives_the_same_rows(tmp_path: Path, kind: str) -> None:
    write_challenge(tmp_path)
    expected = load(tmp_path, cache_dir=tmp_path / "cache")["val"].to_list()
    path = tmp_path / "val.h5"
    if kind == "user block":
        add_user_block(path)
    else:
        with (
            h5py.File(path) as old,
            h5py.File(tmp_path / "new", "w", libver="latest" if "new" in kind else None) as new,
        ):
            for name in (f"{key}/{member}" for key in old for member in old[key]):
                values = old[name][()]
                if kind == "compact":
                    created = h5py.h5p.create(h5py.h5p.DATASET_CREATE)
                    created.set_layout(h5py.h5d.COMPACT)
                    key, member = name.split("/")
                    like = old[name].id
                    parent = new.require_group(key).id
                    made = h5py.h5d.create(parent, member.encode(), like.get_type(), like.get_space(), created)
                    made.write(h5py.h5s.ALL, h5py.h5s.ALL, np.asarray(values))
                else:
                    dtype = values.dtype.newbyteorder(">") if kind == "big-endian" else values.dtype
                    new.create_dataset(
                        name, data=values.astype(dtype), chunks=(kind == "chunked" and values.ndim > 0) or None
                    )
        (tmp_path / "new").replace(path)
    assert load(tmp_path, cache_dir=tmp_path / "cache")["val"].to_list() == expected


def test_types_that_change_from_image_to_image_are_read(tmp_path: Path) -> None:
    write_challenge(tmp_path)
    expected = load(tmp_path, cache_dir=tmp_path / "cache")["val"].to_list()
    with h5py.File(tmp_path / "val.h5", "r+") as file:
        for key, (label, metadata) in zip(
            file, [("int8", ">f8"), ("bool", "uint64"), ("float32", "int16")], strict=False
        ):
            for name, dtype in (("label", label), ("metadata", metadata)):
                values = file[key][name][()]
                del file[key][name]
                file[key][name] = values.astype(dtype)
    assert load(tmp_path, cache_dir=tmp_path / "cache")["val"].to_list() == expected


@pytest.mark.parametrize("user_block", [False, True])
def test_refuses_data_kept_in_other_files(tmp_path: Path, user_block: bool) -> None:
    write_challenge(tmp_path)
    if user_block:
        add_user_block(tmp_path / "val.h5")
    (tmp_path / "raw").write_bytes(bytes(3 * 12 * 14))
    edit(tmp_path, "val", "3/img", None)
    with h5py.File(tmp_path / "val.h5", "r+") as file:
        file.create_dataset("3/img", (3, 12, 14), "uint8", external=[(str(tmp_path / "raw"), 0, h5py.h5f.UNLIMITED)])
    refused(tmp_path, r"val\.h5: 3/img: data kept in other files")


def test_refuses_a_virtual_dataset(tmp_path: Path) -> None:
    write_challenge(tmp_path)
    edit(tmp_path, "val", "3/img", None)
    layout = h5py.VirtualLayout((3, 12, 14), "uint8")
    layout[...] = h5py.VirtualSource(tmp_path / "train.h5", "0/img", (3, 12, 14))
    with h5py.File(tmp_path / "val.h5", "r+") as file:
        file.create_virtual_dataset("3/img", layout)
    refused(tmp_path, r"val\.h5: 3/img: data kept in other files")


@pytest.mark.parametrize(
    "break_file", [truncate, lambda path: path.write_bytes(b"not HDF5"), lambda path: path.write_bytes(b"")]
)
def test_refuses_a_broken_file(tmp_path: Path, break_file: Callable[[Path], object]) -> None:
    write_challenge(tmp_path)
    break_file(tmp_path / "val.h5")
    refused(tmp_path, r"val\.h5: not a complete HDF5 file .*copy or download it again")


@pytest.mark.parametrize("key", ["0", "1"])  # looked at before the conversion, and not
def test_refuses_one_damaged_image_among_many(tmp_path: Path, key: str) -> None:
    write_challenge(tmp_path, counts={"train": 70, "val": 2})
    damage_chunk(tmp_path / "train.h5", f"{key}/img")
    refused(tmp_path, rf"train\.h5: {key}/img: unreadable")


def make_contiguous(path: Path) -> None:
    """Write images without compression, which is how h5py writes them by default."""
    with h5py.File(path) as old, h5py.File(path.with_suffix(".new"), "w") as new:
        for name in (f"{key}/{member}" for key in old for member in old[key]):
            new[name] = old[name][()]
    path.with_suffix(".new").replace(path)


def outcomes(path: Path) -> dict[str, object]:
    """Values of each array in the file, or the error."""
    found: dict[str, object] = {}
    try:
        with hdf5.open_file(path) as file:
            for key in map(str, range(COUNTS["val"])):
                for name, kinds in (("img", "uf"), ("label", "biuf"), ("metadata", "iuf")):
                    try:
                        group = hdf5.member(file, key)
                        data = hdf5.array(group, name, kinds) if group is not None and group.is_group else None
                        found[f"{key}/{name}"] = None if data is None else (data.dtype, hdf5.read(data).tolist())
                    except HistoError as error:
                        found[f"{key}/{name}"] = str(error)
    except HistoError as error:
        found["file"] = str(error)
    return found


@pytest.mark.parametrize("address", [2**64 - 1, 2**63, 2**40, "end"])
@pytest.mark.parametrize("member", ["img", "label", "metadata"])
def test_refuses_values_outside_the_file(tmp_path: Path, member: str, address: int | str) -> None:
    write_challenge(tmp_path)
    path = tmp_path / "val.h5"
    make_contiguous(path)
    with h5py.File(path) as file:
        offset = file[f"3/{member}"].id.get_offset().to_bytes(8, "little")
    content = path.read_bytes()
    assert content.count(offset) == 1
    moved = len(content) - 1 if address == "end" else int(address)
    path.write_bytes(content.replace(offset, moved.to_bytes(8, "little")))
    refused(tmp_path, rf"val\.h5: 3/{member}: (unreadable|its values were never written)")


def test_changed_bytes_have_the_same_effect_on_arrays_that_are_not_opened(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_challenge(tmp_path, counts={"val": COUNTS["val"]})
    path = tmp_path / "val.h5"
    make_contiguous(path)
    content, opened = path.read_bytes(), mock.Mock(wraps=hdf5._open)
    monkeypatch.setattr(hdf5, "_open", opened)
    outcomes(path)
    assert opened.call_count == 3  # the arrays of the first image
    with h5py.File(path) as file:
        headers = [h5py.h5o.get_info(file[f"3/{name}"].id).addr for name in ("img", "label", "metadata")]
    random = np.random.default_rng(0)
    positions = [*random.choice(len(content), 60, replace=False), *np.add.outer(headers, range(0, 120, 3)).ravel()]
    for position in positions:
        changed = bytearray(content)
        changed[position] ^= 1 << random.integers(8)
        path.write_bytes(changed)
        fast = outcomes(path)
        with monkeypatch.context() as patch:
            patch.setattr(hdf5, "_alike", lambda *_: None)
            assert outcomes(path) == fast, position
