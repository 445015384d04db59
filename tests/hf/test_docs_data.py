"""The code of docs/data.md runs, from the first block to the last."""

import re
from functools import partial
from pathlib import Path

import torch

from scalemlo.hf.data.columns import FORMATS
from tests.hf.test_packing_data import llama
from tests.hf.words import word_tokenizer

PAGE = (Path(__file__).parents[2] / "docs" / "data.md").read_text()


def test_the_page_runs_and_trains(caplog):
    rows = [{"prompt": "ask ", "completion": f"a{i}", "source": "xy"[i % 2]} for i in range(8)]
    model = llama("sdpa")
    model.resize_token_embeddings(64, mean_resizing=False)
    names = {
        "torch": torch,
        "tokenizer": word_tokenizer(),
        "model": model,
        "train_rows": rows,
        "meta_rows": rows[:4],
        "sgd": partial(torch.optim.SGD, lr=1.0),
        "adamw": partial(torch.optim.AdamW, lr=1e-2),
    }
    blocks = re.findall(r"^```python\n(.*?)^```", PAGE, re.M | re.S)
    assert len(blocks) == 3
    for block in blocks:
        exec(block, names)
    assert "4 of 4 rows of meta also stand in train" in caplog.text
    names["program"].run(2, progress=False)
    assert names["program"].state_dict("rater")["logits"].abs().max() > 0
    assert {i % 2 for i in next(iter(names["data"]))["example_id"].tolist()} == {0, 1}


def test_the_table_has_every_format_in_order():
    assert re.findall(r"^\| `(\w+)` \| `", PAGE, re.M)[: len(FORMATS)] == [f.name for f in FORMATS]
