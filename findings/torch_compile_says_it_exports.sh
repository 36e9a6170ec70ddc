#!/usr/bin/env bash
# torch 2.11.0 (2.8 to 2.12; not 2.13): traced by torch.compile, torch.compiler.is_exporting() is True, though nothing is exported.
# Code that leaves something out of exported programs leaves it out of compiled ones, too, without a word. The flag behind it,
# torch.compiler._is_exporting_flag, is right in both.
# Output seen: eager False, compiled True, flag False, exported True
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check torch==2.11.0
cd "$folder"
cat > shown.py <<'PY'
import torch


class Model(torch.nn.Module):
    def __init__(self, ask):
        super().__init__()
        self.ask = ask

    def forward(self, x):
        return x + 1 if self.ask() else x


x, official = torch.zeros(1), Model(torch.compiler.is_exporting)
flag = Model(lambda: torch.compiler._is_exporting_flag)
eager = bool(official(x))
compiled, by_flag = (bool(torch.compile(model, backend="eager", fullgraph=True)(x)) for model in (official, flag))
exported = bool(torch.export.export(official, (x,)).module()(x))
print(f"eager {eager}, compiled {compiled}, flag {by_flag}, exported {exported}")
assert (eager, compiled, by_flag, exported) == (False, True, False, True), "the behaviour has changed"
PY
"$folder/venv/bin/python" -W ignore shown.py
