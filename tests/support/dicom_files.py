"""DICOM files in miniature, written with pydicom."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import numpy as np
import pydicom
from pydicom.dataset import Dataset, FileDataset, FileMetaDataset
from pydicom.uid import UID, ExplicitVRLittleEndian, SecondaryCaptureImageStorage

# In every text element of `planted`; a patient's name has parts.
SECRET = "Wilhelmine"


def dicom(pixels: np.ndarray, **elements: Any) -> FileDataset:
    """An image of `pixels`: (H, W) gray or (H, W, 3) RGB, uint8 or (u)int16, with frames before that as `frames`."""
    frames = elements.pop("frames", None)
    shape = pixels.shape[1:] if frames else pixels.shape
    meta = FileMetaDataset()
    meta.TransferSyntaxUID = elements.pop("syntax", ExplicitVRLittleEndian)
    meta.MediaStorageSOPClassUID = SecondaryCaptureImageStorage
    meta.MediaStorageSOPInstanceUID = UID("1.2.3.4")
    file = FileDataset("", {}, file_meta=meta, preamble=bytes(128))
    file.SOPClassUID, file.SOPInstanceUID = SecondaryCaptureImageStorage, UID("1.2.3.4")
    file.Rows, file.Columns = shape[:2]
    file.SamplesPerPixel = 3 if len(shape) == 3 else 1
    file.PhotometricInterpretation = "RGB" if len(shape) == 3 else "MONOCHROME2"
    if len(shape) == 3:
        file.PlanarConfiguration = 0
    file.BitsAllocated = file.BitsStored = 8 * pixels.dtype.itemsize
    file.HighBit = file.BitsStored - 1
    file.PixelRepresentation = int(pixels.dtype.kind == "i")
    file.PixelData = pixels.tobytes() + b"\0" * (pixels.nbytes % 2)
    if frames:
        file.NumberOfFrames = frames
    if "BitsStored" in elements:
        file.HighBit = elements["BitsStored"] - 1
    for name, value in elements.items():
        if value is None:
            delattr(file, name)
        else:
            setattr(file, name, value)
    return file


def content(file: FileDataset) -> bytes:
    """The bytes of a file."""
    buffer = io.BytesIO()
    pydicom.dcmwrite(buffer, file, enforce_file_format=True)
    return buffer.getvalue()


def dicom_bytes(pixels: np.ndarray, **elements: Any) -> bytes:
    """The bytes of `dicom`."""
    return content(dicom(pixels, **elements))


def planted(file: FileDataset, patient: str) -> FileDataset:
    """The file with `SECRET` in an element of every name that holds free text, and `patient` as part of the id."""
    text = {"PN", "LO", "SH", "LT", "ST", "UT", "UC", "AE"}
    for tag, (kind, _, _, _, keyword) in pydicom.datadict.DicomDictionary.items():
        if kind in text and keyword and tag not in file and tag >> 16 not in (0x0000, 0x0002, 0x0004, 0xFFFE):
            setattr(file, keyword, f"{SECRET}^{keyword[:1]}" if kind == "PN" else SECRET)
    file.PatientID = f"{SECRET}{patient}"[:64]
    file.StudyInstanceUID = UID("1.2.826.0.1.3680043.99.4711")
    file.PatientBirthDate = "18880229"
    item = Dataset()
    item.PatientName = f"{SECRET}^nested"
    file.OtherPatientIDsSequence = [item]
    file.add_new(0x00091010, "LO", SECRET)  # private
    return file


def write_dicom(path: Path, file: FileDataset) -> Path:
    """Write a file, with its folder."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content(file))
    return path
