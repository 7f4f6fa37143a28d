"""Wheels made in tests, and folders and indexes that pip finds them in."""

import zipfile
from pathlib import Path


def make_wheel(folder: Path, project: str, files: dict[str, bytes], version: str = "0.1.0") -> Path:
    """Writes a wheel with these files; returns its path."""
    folder.mkdir(parents=True, exist_ok=True)
    name = project.replace("-", "_")
    wheel = folder / f"{name}-{version}-py3-none-any.whl"
    about = f"{name}-{version}.dist-info"
    with zipfile.ZipFile(wheel, "w", zipfile.ZIP_DEFLATED) as archive:
        for path, content in files.items():
            archive.writestr(path, content)
        archive.writestr(f"{about}/METADATA", f"Metadata-Version: 2.1\nName: {project}\nVersion: {version}\n")
        archive.writestr(f"{about}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        archive.writestr(f"{about}/RECORD", "")
    return wheel
