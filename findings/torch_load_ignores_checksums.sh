#!/usr/bin/env bash
# torch 2.13.0: torch.save writes a zip archive, which has a CRC-32 checksum of each record. torch.load does not compare them: of a
# checkpoint in which one bit of a tensor has changed, as a bad disk or copy may leave it, it gives other values without an error
# or a warning, with weights_only=True as without. Python's zipfile names the record.
# Output seen: written [1.0, 1.0, 1.0, 1.0], read [1.0, 1.0, 1.0, 0.25] and [1.0, 1.0, 1.0, 0.25]; zipfile: state/data/0 is damaged
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check torch==2.13.0
cd "$folder"
"$folder/venv/bin/python" -W ignore - <<'PY'
import pathlib
import struct
import zipfile

import torch

path, stored = pathlib.Path("state.pt"), struct.pack("<4f", 1, 1, 1, 1)
torch.save({"x": torch.ones(4)}, path)
archive = bytearray(path.read_bytes())
assert archive.count(stored) == 1
archive[archive.index(stored) + 15] ^= 1  # of the exponent of the last number
path.write_bytes(archive)

read = [torch.load(path, weights_only=only)["x"].tolist() for only in (True, False)]
damaged = zipfile.ZipFile(path).testzip()
print(f"written {[1.0] * 4}, read {read[0]} and {read[1]}; zipfile: {damaged} is damaged")
assert read[0] == read[1] != [1.0] * 4, "the behaviour has changed"
assert damaged == "state/data/0", "the behaviour has changed"
PY
