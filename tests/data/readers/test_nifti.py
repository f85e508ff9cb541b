"""NIfTI volumes as nibabel writes them: content, patients and ids of slices, and refusals."""

from __future__ import annotations

import gzip
import sys
from pathlib import Path

import nibabel
import numpy as np
import pytest
from fixtures import truncate

from hf_histo.config import DataOptions
from hf_histo.data.load import load
from hf_histo.data.protocol import arrange
from hf_histo.data.schema import ImageTable
from hf_histo.errors import HistoError

SHAPE = (8, 10, 6)  # right, front, up
AFFINE = np.diag([1.0, 1.0, 2.0, 1.0])


def volume(seed: int = 0) -> np.ndarray:
    """Float voxels from 0 to 255 that differ everywhere, and hardly grow between neighbors of one seed."""
    return np.random.default_rng(seed).permutation(np.linspace(0, 255, np.prod(SHAPE))).reshape(SHAPE)


def write(path: Path, voxels: np.ndarray, affine: np.ndarray = AFFINE, kind: type = nibabel.Nifti1Image) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    image = kind(voxels, affine)
    image.header.set_slope_inter(1, 0)
    image.to_filename(path)
    return path


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Two classes; in train two patients each, one of them with two volumes."""
    for number, name in enumerate(["sub-01_T1w.nii.gz", "sub-01_T2w.nii.gz", "sub-02/anat/sub-02_T1w.nii"]):
        write(tmp_path / "data/train/glioma" / name, volume(number))
    for number, name in enumerate(["IXI002-T1.nii.gz", "P7/t1.nii.gz"]):
        write(tmp_path / "data/train/none" / name, volume(10 + number))
    for number, name in enumerate(["glioma/sub-03.nii.gz", "none/P8/t1.nii.gz"]):
        write(tmp_path / "data/test" / name, volume(20 + number))
    return tmp_path / "data"


def images(folder: Path, split: str = "full", **options: object) -> dict[str, np.ndarray]:
    """Load gray images (H, W) by id."""
    rows = load(DataOptions(data=str(folder), **options))[split]  # type: ignore[arg-type]
    table = ImageTable(rows)
    pictures = {key: table[row]["image"].numpy() for row, key in enumerate(rows["id"])}
    assert all(np.array_equal(picture[0], picture[2]) for picture in pictures.values())
    return {key: picture[1] for key, picture in pictures.items()}


def alone(folder: Path, voxels: np.ndarray, affine: np.ndarray = AFFINE, **options: object) -> list[np.ndarray]:
    """The slices of one volume."""
    write(folder / "a/one.nii.gz", voxels, affine)
    write(folder / "b/other.nii.gz", volume(99))
    return [picture for key, picture in images(folder, **options).items() if key.startswith("a/")]


def expected(voxels: np.ndarray) -> np.ndarray:
    low, high = np.percentile(voxels, (0.5, 99.5))
    return np.rint(((voxels - low) / (high - low)).clip(0, 1) * 255).astype(np.uint8)


def test_slices_patients_and_ids(folder: Path) -> None:
    data = load(folder)
    train = data["train"]
    assert train.features["label"].names == ["glioma", "none"]
    assert [len(rows) for rows in data.values()] == [5 * 6, 2 * 6]
    assert train["id"][:2] == ["train/glioma/sub-01_T1w.nii.gz:0", "train/glioma/sub-01_T1w.nii.gz:1"]
    patients = dict(zip(train["id"], train["group"], strict=True))
    assert patients["train/glioma/sub-01_T2w.nii.gz:5"] == "sub-01"
    assert patients["train/glioma/sub-02/anat/sub-02_T1w.nii:3"] == "sub-02"
    assert patients["train/none/IXI002-T1.nii.gz:0"] == "IXI002-T1"
    assert patients["train/none/P7/t1.nii.gz:0"] == "P7"
    assert "NIfTI volumes; group: patient; {'train': 5, 'test': 2}" in train.info.description


def test_no_patient_is_on_both_sides_of_a_split_that_is_made(folder: Path) -> None:
    for number in range(8):
        write(folder / f"train/{('glioma', 'none')[number % 2]}/sub-1{number}.nii.gz", volume(30 + number))
    data = arrange(load(folder), "published")
    groups = {name: set(rows["group"]) for name, rows in data.items()}
    assert len(groups["val"]) and not groups["train"] & groups["val"]
    assert len(groups["train"] | groups["val"]) == 12


@pytest.mark.parametrize("plane", ["axial", "coronal", "sagittal"])
def test_slices_look_as_in_radiology(tmp_path: Path, plane: str) -> None:
    voxels = volume()
    gray = expected(voxels)
    found = alone(tmp_path, voxels, slice_plane=plane)
    if plane == "axial":  # front above, the patient's right on the left
        wanted = [gray[::-1, ::-1, number].T for number in range(6)]
    elif plane == "coronal":
        wanted = [gray[::-1, number, ::-1].T for number in range(10)]
    else:  # the front on the left
        wanted = [gray[number, ::-1, ::-1].T for number in range(8)]
    assert len(found) == len(wanted)
    assert all(np.array_equal(one, other) for one, other in zip(found, wanted, strict=True))


@pytest.mark.parametrize("codes", ["LPS", "SRA", "ILP", "PIR"])
def test_any_orientation_gives_the_same_slices(tmp_path: Path, codes: str) -> None:
    plain = nibabel.Nifti1Image(volume(), AFFINE)
    to = nibabel.orientations.axcodes2ornt(codes)
    turned = plain.as_reoriented(nibabel.orientations.ornt_transform(nibabel.io_orientation(AFFINE), to))
    assert turned.shape != SHAPE or codes == "LPS"
    one = alone(tmp_path / "one", np.asarray(plain.dataobj))
    other = alone(tmp_path / "other", np.asarray(turned.dataobj), turned.affine)
    assert all(np.array_equal(a, b) for a, b in zip(one, other, strict=True))


def test_every_way_of_storing_gives_the_same_slices(tmp_path: Path) -> None:
    whole = np.rint(volume()).astype(np.int16)
    wanted = alone(tmp_path / "0", whole)
    for number, (name, voxels, kind) in enumerate(
        [
            ("a/1.nii", whole, nibabel.Nifti1Image),
            ("a/1.NII.GZ", whole.astype(np.float64), nibabel.Nifti2Image),
            ("a/1.nii", whole.astype(">i2"), nibabel.Nifti1Image),
            ("a/1.nii.gz", whole.astype(np.uint8)[..., None], nibabel.Nifti1Image),
        ],
        start=1,
    ):
        write(tmp_path / str(number) / name, voxels, kind=kind)
        write(tmp_path / str(number) / "b/2.nii", volume(99))
        found = [image for key, image in images(tmp_path / str(number)).items() if key.startswith("a/")]
        assert all(np.array_equal(one, other) for one, other in zip(found, wanted, strict=True)), name
    scaled = nibabel.Nifti1Image(whole, AFFINE)
    scaled.header.set_slope_inter(0.5, -1000)
    (tmp_path / "5/a").mkdir(parents=True)
    scaled.header["vox_offset"] = 352
    (tmp_path / "5/a/1.nii").write_bytes(scaled.header.binaryblock + b"\0" * 4 + whole.tobytes(order="F"))
    write(tmp_path / "5/b/2.nii", volume(99))
    found = [image for key, image in images(tmp_path / "5").items() if key.startswith("a/")]
    assert len(found) == len(wanted)
    assert max(np.abs(a.astype(int) - b).max() for a, b in zip(found, wanted, strict=True)) <= 1  # rounding


def test_values_that_are_no_numbers(tmp_path: Path) -> None:
    voxels = volume()
    odd = voxels.copy()
    odd[1, 2, 3], odd[1, 3, 3], odd[1, 4, 3] = np.nan, np.inf, -np.inf
    found = alone(tmp_path, odd)[3]
    assert [found[9 - y, 6] for y in (2, 3, 4)] == [0, 255, 0]
    low, high = np.percentile(odd[np.isfinite(odd)], (0.5, 99.5))
    assert found[0, 0] == np.rint(255 * ((odd[7, 9, 3] - low) / (high - low)).clip(0, 1))


def test_slices_with_enough_of_the_head(tmp_path: Path) -> None:
    head = np.zeros((20, 20, 16))
    for number, side in enumerate([0, 2, 8, 12, 16, 16, 16, 16, 16, 16, 12, 8, 6, 3, 1, 0]):
        head[:side, :side, number] = 100 + np.arange(side)[:, None]
    write(tmp_path / "a/one.nii", head)
    write(tmp_path / "b/two.nii", head)

    def numbers(**options: object) -> list[int]:
        return [int(key.split(":")[1]) for key in images(tmp_path, **options) if key.startswith("a/")]

    assert numbers() == [*range(2, 12)]  # 8 x 8 is a quarter of 16 x 16
    assert numbers(slices=3) == [3, 7, 10]
    assert numbers(slices=1) == [7]
    assert numbers(slices=99) == [*range(2, 12)]
    assert len(numbers(slice_plane="sagittal")) > 0


def bomb() -> bytes:
    """A file of 100 KB that expands to a volume of 16 million voxels."""
    image = nibabel.Nifti1Image(np.zeros((2, 2, 2), np.uint8), AFFINE)
    image.header.set_data_shape((512, 512, 512))
    image.header.set_data_dtype(np.float64)
    image.header["vox_offset"] = 352
    return gzip.compress(image.header.binaryblock + b"\0" * 4, mtime=0)


def header(**fields: object) -> bytes:
    image = nibabel.Nifti1Image(volume().astype(np.float32), AFFINE)
    image.header["vox_offset"] = 352
    for name, value in fields.items():
        image.header[name] = value
    return image.header.binaryblock + b"\0" * 4 + np.asarray(image.dataobj).tobytes(order="F")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "not a readable NIfTI volume"),
        (b"<html>404</html>" * 40, "not a readable NIfTI volume .*starts with"),
        (gzip.compress(b"\0" * 10**6, mtime=0), "not a readable NIfTI volume .*starts with"),
        (bomb(), r"not a readable NIfTI volume \(declares 1,073,742,176 bytes and has"),
        (header(dim=[3, 800, 800, 800, 1, 1, 1, 1]), r"shape \(800, 800, 800\), expected at most 134,217,728 voxels"),
        (header(dim=[3, 8, 10, 7, 1, 1, 1, 1]), r"not a readable NIfTI volume \(declares 2,592 bytes and has 2,272"),
        (header(dim=[4, 8, 10, 3, 2, 1, 1, 1]), r"shape \(8, 10, 3, 2\), expected three dimensions"),
        (header(dim=[2, 8, 60, 1, 1, 1, 1, 1]), r"shape \(8, 60\), expected three dimensions"),
        (header(dim=[3, 8, -10, 6, 1, 1, 1, 1]), r"shape \(8, -10, 6\), expected three dimensions"),
        (header(vox_offset=np.nan), "not a readable NIfTI volume"),
        (header(vox_offset=-352), "not a readable NIfTI volume"),
        (header(vox_offset=0), "not a readable NIfTI volume"),
        (header(vox_offset=1e30), "not a readable NIfTI volume"),
        (header(datatype=32, bitpix=64), "complex64, expected numbers"),
        (header(datatype=128, bitpix=24), r".*'u1'.*, expected numbers of up to 8 bytes"),
        (header(datatype=9999), "not a readable NIfTI volume"),
        (header(scl_slope=1, scl_inter=np.nan), "not a readable NIfTI volume"),
        (header(sform_code=1, srow_x=[0, 0, 0, 0]), "not a readable NIfTI volume"),
        (header(sform_code=1, srow_x=[np.nan] * 4), "not a readable NIfTI volume"),
        (header(sform_code=0, qform_code=0), "qform_code and sform_code are 0, which states no orientation, expected"),
        (header()[:352] + b"\0" * 1920, "almost no voxel differs from 0, expected different values"),
        (header()[:352] + b"\xff" * 1920, "almost no voxel differs from"),  # all NaN
    ],
)
def test_refusals(folder: Path, content: bytes, message: str) -> None:
    (folder / "train/none/bad.nii.gz").write_bytes(content)
    with pytest.raises(HistoError, match=rf"train/none/bad\.nii\.gz: {message}") as caught:
        load(folder)
    assert "\n" not in str(caught.value)


def test_what_is_cut_off_or_changed_is_refused_or_left_out(folder: Path) -> None:
    for name in ("train/glioma/sub-01_T1w.nii.gz", "train/glioma/sub-02/anat/sub-02_T1w.nii"):
        truncate(folder / name)
    changed = folder / "train/none/IXI002-T1.nii.gz"
    content = bytearray(changed.read_bytes())
    content[-6] ^= 1  # in the checksum
    changed.write_bytes(content)
    with pytest.raises(HistoError, match=r"sub-01_T1w\.nii\.gz: not a readable"):
        load(folder)
    train = load(DataOptions(data=str(folder), on_bad_image="skip"))["train"]
    assert set(train["group"]) == {"sub-01", "P7"} and len(train) == 12
    for name in ("glioma/sub-01_T1w.nii.gz", "glioma/sub-02/anat/sub-02_T1w.nii", "none/IXI002-T1.nii.gz"):
        assert f"left out train/{name}: not a readable NIfTI volume" in train.info.description


def test_extensions_are_not_read(tmp_path: Path) -> None:
    """The length of an extension is declared in the file, without a bound."""
    content = bytearray(header(vox_offset=352 + 16))
    content[348:352] = b"\1\0\0\0"
    content[352:352] = (2**31 - 16).to_bytes(4, "little") + b"\0" * 12
    (tmp_path / "a").mkdir()
    (tmp_path / "a/one.nii").write_bytes(content)
    write(tmp_path / "b/two.nii", volume())
    assert len(images(tmp_path)) == 12


def test_a_class_without_volumes(folder: Path) -> None:
    (folder / "train/pituitary").mkdir()
    (folder / "train/pituitary/notes.txt").touch()
    with pytest.raises(HistoError, match="train/pituitary: no NIfTI volumes in this folder"):
        load(folder)


def test_pictures_beside_volumes_are_reported(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    (folder / "train/glioma/preview.png").touch()
    load(folder)
    assert "left out 1 files that are not NIfTI volumes, e.g. preview.png" in caplog.text


def test_without_nibabel_the_extra_is_named(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(folder / "train/none/not-in-the-cache.nii", volume(77))
    monkeypatch.setitem(sys.modules, "nibabel", None)
    with pytest.raises(HistoError, match=r'pip install "hf_histo\[nifti\]"'):
        load(folder)
